// AdamW over any number of tensors. The maths stands in gptfast/ops/adamw.py, as does the table of
// tensors that tells where they are.
//
// Every tensor is cut into chunks. Three sweeps make a step: the sum of squares of each chunk of the
// gradients (only when they are clipped); the scalars of each tensor; the update. Chunks do not
// depend on the number of threads, and their sums are added up in order.
//
// Bytes of an element, in fp32: p, g, m and v are read and p, m and v written, 28; clipping reads g
// once more, less what the last-level cache kept of it: the update goes through the chunks
// backwards, beginning with those that the norm has just read.
#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

// tensors: (tensors, 12) and chunks: (chunks, 2), as `Tables` in gptfast/ops/adamw.py has them;
// chunks are of `chunk` elements. hyper: (groups, 8). max_norm: negative where nothing is clipped.
// grad_scale, found_inf: one number each, or null. norm: one number. partial: (chunks,), scalars:
// (tensors, 8): scratch.
DECLARE_KERNEL(adamw, void(const int64_t* tensors, const int64_t* chunks, const double* hyper,
                           int64_t n_tensors, int64_t n_chunks, int64_t chunk, double max_norm,
                           const float* grad_scale, const float* found_inf, float* norm,
                           float* partial, float* scalars))

namespace gptfast::GPTFAST_ISA {
namespace {

// A row of the table, and one of the groups.
struct Tensor {
  int64_t p, g, m, v, master, step, lr, numel, group, p_code, g_code, aligned;
};
struct Group {
  double lr, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, sign;
};
struct Chunk {
  int64_t tensor, number;
};
// What one tensor's elements are computed with.
struct Scalars {
  float grad_factor, one_minus_beta1, beta2, one_minus_beta2, decay, size, inverse_root, eps;
};

constexpr double kClipEps = 1e-6;  // CLIP_EPS in gptfast/ops/adamw.py

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
float sum_of_squares(const T* g, int64_t n) {
  f32v sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const f32v x = load(g + i + j * W);
      sums[j] += x * x;
    }
  for_each_vector(n - i, [&](int64_t at, auto part) {
    const f32v x = part.load(g + i + at);
    sums[0] += x * x;
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Four streams are more than the processor's own prefetcher keeps up with: asked for 1 KiB ahead,
// 124 M elements took 72 to 84 ms where they had taken 78 to 91, as long as it takes to read and
// write them with no arithmetic at all. Stores that bypass the cache took 100: the lines are there.
constexpr int kAheadBytes = 1024;

template <class P, class G, bool HAS_MASTER>
void update(P* p, const G* g, float* m, float* v, float* master, int64_t n, const Scalars& s) {
  for_each_vector(n, [&](int64_t i, auto part) {
    read_ahead<kAheadBytes>(p + i);
    read_ahead<kAheadBytes>(g + i);
    read_ahead<kAheadBytes>(m + i);
    read_ahead<kAheadBytes>(v + i);
    if (HAS_MASTER) read_ahead<kAheadBytes>(master + i);
    const f32v grad = part.load(g + i) * s.grad_factor;
    f32v w = HAS_MASTER ? part.load(master + i) : part.load(p + i);
    f32v mean = part.load(m + i), square = part.load(v + i);
    mean = mean + s.one_minus_beta1 * (grad - mean);
    square = s.beta2 * square + s.one_minus_beta2 * grad * grad;
    w = w - s.decay * w - s.size * mean / (sqrt(square) * s.inverse_root + s.eps);
    part.store(m + i, mean);
    part.store(v + i, square);
    if (HAS_MASTER) part.store(master + i, w);
    part.store(p + i, w);
  });
}

void update_chunk(const Tensor& t, int64_t begin, int64_t n, const Scalars& s) {
  with_dtype(static_cast<DType>(t.p_code), [&](auto p_type) {
    with_dtype(static_cast<DType>(t.g_code), [&](auto g_type) {
      using P = decltype(p_type);
      using G = decltype(g_type);
      auto* p = at<P>(t.p) + begin;
      const auto* g = at<const G>(t.g) + begin;
      float *m = at<float>(t.m) + begin, *v = at<float>(t.v) + begin;
      if (t.master)
        update<P, G, true>(p, g, m, v, at<float>(t.master) + begin, n, s);
      else
        update<P, G, false>(p, g, m, v, nullptr, n, s);
    });
  });
}

Scalars scalars_of(const Group& h, double lr, double step, double factor) {
  const double power1 = std::exp(step * h.log_beta1), power2 = std::exp(step * h.log_beta2);
  return {static_cast<float>(factor * h.sign),
          static_cast<float>(1 - h.beta1),
          static_cast<float>(h.beta2),
          static_cast<float>(1 - h.beta2),
          static_cast<float>(lr * h.weight_decay),
          static_cast<float>(lr / (1 - power1)),
          static_cast<float>(1 / std::sqrt(1 - power2)),
          static_cast<float>(h.eps)};
}

void adamw(const int64_t* tensor_table, const int64_t* chunk_table, const double* hyper,
           int64_t n_tensors, int64_t n_chunks, int64_t chunk, double max_norm,
           const float* grad_scale, const float* found_inf, float* norm, float* partial,
           float* scalar_table) {
  const auto* tensors = reinterpret_cast<const Tensor*>(tensor_table);
  const auto* chunks = reinterpret_cast<const Chunk*>(chunk_table);
  const auto* groups = reinterpret_cast<const Group*>(hyper);
  auto* scalars = reinterpret_cast<Scalars*>(scalar_table);
  int64_t elements = 0;
  for (int64_t i = 0; i < n_tensors; ++i) elements += tensors[i].numel;
  // A thread gets work for some ten microseconds at least.
  constexpr int64_t kGrainElements = 32768;
  const int64_t grain = kGrainElements * n_chunks / (elements + 1) + 1;
  auto elements_of = [&](int64_t i) {
    const int64_t left = tensors[chunks[i].tensor].numel - chunks[i].number * chunk;
    return left < chunk ? left : chunk;
  };

  double factor = grad_scale ? 1.0 / *grad_scale : 1.0;
  if (max_norm >= 0) {
    parallel_for(n_chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Tensor& t = tensors[chunks[i].tensor];
        with_dtype(static_cast<DType>(t.g_code), [&](auto g_type) {
          const auto* g = at<const decltype(g_type)>(t.g) + chunks[i].number * chunk;
          partial[i] = sum_of_squares(g, elements_of(i));
        });
      }
    });
    double total = 0;
    for (int64_t i = 0; i < n_chunks; ++i) total += partial[i];
    const double size = std::sqrt(total) * factor;
    *norm = static_cast<float>(size);
    const double clip = max_norm / (size + kClipEps);
    factor *= clip > 1 ? 1.0 : clip;  // and not a minimum, which may drop a NaN
  }

  if (found_inf && *found_inf != 0) return;
  for (int64_t i = 0; i < n_tensors; ++i) {
    const Tensor& t = tensors[i];
    const Group& group = groups[t.group];
    const float step = *at<float>(t.step) += 1;
    scalars[i] = scalars_of(group, t.lr ? *at<const float>(t.lr) : group.lr, step, factor);
  }
  parallel_for(n_chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) {
      const int64_t tensor = chunks[i].tensor;
      update_chunk(tensors[tensor], chunks[i].number * chunk, elements_of(i), scalars[tensor]);
    }
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(adamw)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_adamw(pybind11::module_& m) {
  gptfast::bind_kernel(m, "adamw", gptfast::kernel_adamw);
}
#endif
