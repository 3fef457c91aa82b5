// Cross-entropy of each row of logits x (M rows, V columns) with its target class t,
// and its gradient.
//
//   z = x, or k tanh(x / k) with a softcap k;   lse = log sum_c exp(z_c)
//   loss = (1 - s) w_t (lse - z_t) + (s / V) sum_c w_c (lse - z_c) + zeta lse^2
//   dz_c = g [ a exp(z_c - lse) - (1 - s) w_t [c = t] - (s / V) w_c ],  dx_c = dz_c / cosh(x_c/k)^2
//          a = (1 - s) w_t + (s / V) sum_c w_c + 2 zeta lse
//
// with label smoothing s, z-loss zeta and the row's incoming gradient g. w are the class weights, 1
// where none are given. A row whose target is `ignore_index` has loss 0 and gradient 0. Forward
// reads the logits once from memory: a running maximum and sum are updated chunk by chunk, each
// chunk small enough to stay in the first-level cache. While the exponentials of one are summed, the
// next is on its way. Backward reads and writes once; dx may be x.
#include <algorithm>
#include <cfloat>

#include "isa.h"
#include "parallel.h"
#include "softcap.h"
#include "stream.h"

// target: (M,) class indices. weight: (V,) or null. loss, lse: (M,). softcap: 0 for none. Returns the
// first row whose target is neither in [0, V) nor ignore_index (nothing is computed then), or -1.
DECLARE_KERNEL(cross_entropy_fwd,
               int64_t(const void* x, const int64_t* target, const float* weight, float* loss,
                       float* lse, int64_t M, int64_t V, int64_t ignore_index, float smoothing,
                       float z_loss, float softcap, DType dtype))
DECLARE_KERNEL(cross_entropy_bwd,
               void(const float* dloss, const void* x, const int64_t* target, const float* weight,
                    const float* lse, void* dx, int64_t M, int64_t V, int64_t ignore_index,
                    float smoothing, float z_loss, float softcap, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // logits: 16 KiB of fp32; two chunks fit a cache of 48 KiB
constexpr int64_t kGrainElements = 8192;

inline int64_t rows_per_thread(int64_t V) { return kGrainElements / (V + 1) + 1; }

inline float sum(const float* w, int64_t V) {
  f32v total{};
  for_each_vector(V, [&](int64_t c, auto part) { total += part.load(w + c); });
  return reduce_add(total);
}

template <class T, class Cap>
float log_sum_exp(const T* x, Cap cap, int64_t V) {
  float running_max = -FLT_MAX, running_sum = 0;
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = V - begin < kChunk ? V - begin : kChunk;
    f32v top = set1(-FLT_MAX), tops[4] = {top, top, top, top};  // so that none waits for another
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
      for (int k = 0; k < 4; ++k) tops[k] = max(load(x + begin + c + k * W), tops[k]);
    for_each_vector(n - c, [&](int64_t i, auto part) {
      top = max(part.live(part.load(x + begin + c + i), set1(-FLT_MAX)), top);
    });
    for (const f32v& other : tops) top = max(other, top);
    // The cap is monotonic: the largest logit stays the largest.
    const float chunk_max = cap(set1(reduce_max(top)))[0];
    const float new_max = chunk_max > running_max ? chunk_max : running_max;
    float total[1];
    sum_vectors(n, total, [&](int64_t i, auto part, f32v* sums) {
      __builtin_prefetch(x + begin + n + i);  // the next chunk
      const f32v z = cap(part.load(x + begin + i));
      sums[0] += part.live(exp2((z - new_max) * kLog2E), f32v{});
    });
    running_sum = running_sum * std::exp(running_max - new_max) + total[0];
    running_max = new_max;
  }
  return running_max + std::log(running_sum);
}

template <class T, class Cap>
float smoothing_loss(const T* x, Cap cap, const float* weight, float lse,
                     int64_t V) {  // sum_c w_c (lse - z_c)
  f32v total{};
  for_each_vector(V, [&](int64_t c, auto part) {
    f32v term = lse - cap(part.load(x + c));
    if (weight) term *= part.load(weight + c);
    total += part.live(term, f32v{});
  });
  return reduce_add(total);
}

template <class T, class Cap>
void forward(const T* x, Cap cap, const int64_t* target, const float* weight, float* loss,
             float* lse, int64_t M, int64_t V, int64_t ignore_index, float smoothing,
             float z_loss) {
  parallel_for(M, rows_per_thread(V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      if (t == ignore_index) {
        loss[i] = lse[i] = 0;
        continue;
      }
      const T* row = x + i * V;
      lse[i] = log_sum_exp(row, cap, V);
      const float w = weight ? weight[t] : 1.0f;
      const float logit = cap(load_n(row + t, 1))[0];
      loss[i] = (1 - smoothing) * w * (lse[i] - logit);
      if (smoothing != 0) loss[i] += smoothing / V * smoothing_loss(row, cap, weight, lse[i], V);
      if (z_loss != 0) loss[i] += z_loss * lse[i] * lse[i];
    }
  });
}

template <class T, class Cap>
void backward(const float* dloss, const T* x, Cap cap, const int64_t* target, const float* weight,
              const float* lse, T* dx, int64_t M, int64_t V, int64_t ignore_index, float smoothing,
              float z_loss) {
  const float smooth = smoothing / V;
  const float weight_sum = weight && smoothing != 0 ? sum(weight, V) : V;
  // Rows of odd V start anywhere: each is written up to a whole vector's alignment first.
  const bool elements_aligned = reinterpret_cast<uintptr_t>(dx) % sizeof(T) == 0;
  with_stores_if(elements_aligned, dx, M * V * sizeof(T), [&](auto stores) {
    parallel_for(M, rows_per_thread(V), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = target[i];
        const T* row = x + i * V;
        T* out = dx + i * V;
        if (t == ignore_index) {
          std::memset(out, 0, V * sizeof(T));
          continue;
        }
        const float g = dloss[i];
        const float hit = (1 - smoothing) * (weight ? weight[t] : 1.0f);
        const float scale = g * (hit + smooth * weight_sum + 2 * z_loss * lse[i]);
        const f32v at_target = load_n(row + t, 1);  // before dx overwrites it, if it does
        const auto gradient = [&](int64_t c, auto part) {
          read_ahead(row + c);
          const f32v logit = part.load(row + c);
          f32v grad = scale * exp2((cap(logit) - lse[i]) * kLog2E);
          if (smooth != 0) grad -= g * smooth * (weight ? part.load(weight + c) : set1(1.0f));
          stores.store(part, out + c, grad * cap.slope(logit));
        };
        const int64_t head = std::min(elements_to_alignment(out), V);
        if (head) gradient(0, Tail{head});
        for_each_vector(V - head, [&](int64_t c, auto part) { gradient(head + c, part); });
        // The target's entry once more, in fp32 before it is rounded to the storage type.
        f32v grad = scale * exp(cap(at_target) - lse[i]) - g * hit;
        if (smooth != 0) grad -= set1(g * smooth * (weight ? weight[t] : 1.0f));
        store_n(out + t, grad * cap.slope(at_target), 1);
      }
    });
  });
}

template <class Body>  // calls body(T{}, cap)
void with_dtype_and_cap(DType dtype, float softcap, Body&& body) {
  with_dtype(dtype, [&](auto t) {
    if (softcap != 0)
      body(t, Softcap{softcap});
    else
      body(t, Plain{});
  });
}

int64_t cross_entropy_fwd(const void* x, const int64_t* target, const float* weight, float* loss,
                          float* lse, int64_t M, int64_t V, int64_t ignore_index, float smoothing,
                          float z_loss, float softcap, DType dtype) {
  for (int64_t i = 0; i < M; ++i)
    if (target[i] != ignore_index && (target[i] < 0 || target[i] >= V)) return i;
  with_dtype_and_cap(dtype, softcap, [&](auto t, auto cap) {
    forward(static_cast<const decltype(t)*>(x), cap, target, weight, loss, lse, M, V, ignore_index,
            smoothing, z_loss);
  });
  return -1;
}

void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target,
                       const float* weight, const float* lse, void* dx, int64_t M, int64_t V,
                       int64_t ignore_index, float smoothing, float z_loss, float softcap,
                       DType dtype) {
  with_dtype_and_cap(dtype, softcap, [&](auto t, auto cap) {
    using T = decltype(t);
    backward(dloss, static_cast<const T*>(x), cap, target, weight, lse, static_cast<T*>(dx), M, V,
             ignore_index, smoothing, z_loss);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(cross_entropy_fwd)
REGISTER_KERNEL(cross_entropy_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_cross_entropy(pybind11::module_& m) {
  gptfast::bind_kernel(m, "cross_entropy_fwd", gptfast::kernel_cross_entropy_fwd);
  gptfast::bind_kernel(m, "cross_entropy_bwd", gptfast::kernel_cross_entropy_bwd);
}
#endif
