// LayerNorm and RMSNorm over the last dimension (M rows, N columns), and their gradients, alone or
// behind the sum of the residual stream: r = residual + z (x + x_bias), or r = x.
//
//   mean = sum_j r_j / N (0 in RMSNorm),  rstd = 1 / sqrt(sum_j (r_j - mean)^2 / N + eps)
//   xhat = (r - mean) rstd,  y = xhat w + b
//   wdy = dy w,  c1 = mean_j(wdy xhat),  c2 = mean_j(wdy) (0 in RMSNorm)
//   dresidual = (wdy - c1 xhat - c2) rstd + dr,  dx = z dresidual
//   dw = sum_i dy xhat,  db = sum_i dy,  dx_bias = sum_i dx
//
// Forward reads x (and residual) and writes y (and r) once; later sweeps over a row hit the
// first-level cache. Backward reads dy, r (and dr) once and writes dresidual (and dx) once. While a
// row is worked on, the next one is fetched, and a large r is streamed past the caches. The sums
// over rows have two stages: each block of rows into its own fp32 rows of `partial`, then those in
// order, so the result does not depend on the number of threads.
#include <type_traits>

#include "residual.h"
#include "stream.h"

// residual, x_bias, w and b may be null; without residual r is not written. r has residual's dtype.
// mean and rstd are (M,) fp32; without mean it is RMSNorm.
DECLARE_KERNEL(norm_fwd, void(const void* x, const void* residual, const float* x_bias,
                              const float* w, const float* b, void* y, void* r, float* mean,
                              float* rstd, int64_t M, int64_t N, float eps, int64_t threshold,
                              int64_t seed, DType x_dtype, DType r_dtype))
// dy has x_dtype, r and dr have r_dtype; dy, dr and w may be null, and mean in RMSNorm. A gradient
// whose pointer is null is not computed. partial is (blocks, 3, N) fp32, needed when dw, db or
// dx_bias is: block i covers rows [i M / blocks, (i + 1) M / blocks).
DECLARE_KERNEL(norm_bwd,
               void(const void* r, const void* dy, const void* dr, const float* w,
                    const float* mean, const float* rstd, void* dresidual, void* dx, float* dw,
                    float* db, float* dx_bias, float* partial, int64_t blocks, int64_t M, int64_t N,
                    int64_t threshold, int64_t seed, DType x_dtype, DType r_dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;

inline int64_t rows_per_thread(int64_t N) {
  return N > kGrainElements ? 1 : kGrainElements / (N + 1) + 1;
}

// From how many bytes on, of all that it moves, forward streams r. Sum and norm of 4096 x 768, four
// arrays, in fp32 and one thread took 1.45 times as long as PyTorch's fastest with plain stores and
// 0.65 times with streamed ones; in bf16, 25 MB, 0.52 times. (y is read next, and stays in the caches.)
constexpr int64_t kStreamTraffic = 16'000'000;

// Whether to make the rows of r in the first-level cache and to stream them from there. They must be
// whole lines, of pages that the system has not just cleared in the caches.
template <class R>
bool worth_streaming(const R* r, int64_t M, int64_t N, int64_t bytes_moved) {
  const int64_t row_bytes = N * static_cast<int64_t>(sizeof(R));
  return W > 4 && bytes_moved >= kStreamTraffic && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(r) % 64 == 0 && !is_fresh(r, M * row_bytes);
}

// y = (row - mean) rstd w + b, of a row whose sum is known; returns mean, 0 without `centre`,
// and rstd.
template <class T>
void normalise_row(const float* row, const float* w, const float* b, T* y, int64_t N, float eps,
                   float sum, bool centre, float* mean, float* rstd) {
  const float mu = centre ? sum / N : 0.0f;
  float squares[1];
  sum_vectors(N, squares, [&](int64_t j, auto part, f32v* sums) {
    const f32v centred = part.live(part.load(row + j) - mu, f32v{});
    sums[0] += centred * centred;
  });
  const float rs = 1.0f / std::sqrt(squares[0] / N + eps);
  for_each_vector(N, [&](int64_t j, auto part) {
    f32v v = (part.load(row + j) - mu) * rs;
    if (w) v *= part.load(w + j);
    if (b) v += part.load(b + j);
    part.store(y + j, v);
  });
  if (centre) *mean = mu;
  *rstd = rs;
}

template <class T, class R>
void forward(const T* x, const R* residual, const float* x_bias, const float* w, const float* b,
             T* y, R* r, float* mean, float* rstd, int64_t M, int64_t N, float eps,
             const RowDropout& dropout) {
  const bool stream = residual && worth_streaming(r, M, N, 2 * M * N * (sizeof(T) + sizeof(R)));
  parallel_for(M, rows_per_thread(N), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t width = ceil_to(N, 16);      // whole lines
    float* copy = scratch.reserve(2 * width);  // in fp32: later sweeps convert nothing
    R* streamed = reinterpret_cast<R*>(copy + width);
    for (int64_t i = begin; i < end; ++i) {
      const T* branch = x + i * N;
      const R* residual_row = residual ? residual + i * N : nullptr;
      const float* z = residual ? dropout.row(i, N) : nullptr;
      R* r_row = stream ? streamed : residual ? r + i * N : nullptr;
      const bool as_it_is = std::is_same_v<T, float> && !residual;
      float sum[1];
      sum_vectors(N, sum, [&](int64_t j, auto part, f32v* sums) {
        __builtin_prefetch(branch + N + j);
        f32v v = part.load(branch + j);
        if (residual_row) {
          __builtin_prefetch(residual_row + N + j);
          if (x_bias) v += part.load(x_bias + j);
          if (z) v *= part.load(z + j);
          v += part.load(residual_row + j);
          part.store(r_row + j, v);
          v = round_to(v, R{});
        }
        if (!as_it_is) part.store(copy + j, v);
        sums[0] += part.live(v, f32v{});
      });
      if (stream) stream_lines(r + i * N, streamed, N * sizeof(R));
      const float* row = as_it_is ? reinterpret_cast<const float*>(branch) : copy;
      normalise_row(row, w, b, y + i * N, N, eps, sum[0], mean != nullptr,
                    mean ? mean + i : nullptr, rstd + i);
    }
  });
}

// Where the gradients of one row go; those that are null are not computed.
template <class T, class R>
struct RowGradients {
  R* dresidual;
  T* dx;
  float *dw, *db, *dx_bias;  // added to
};

template <class T, class R>
void backward_row(const R* r, const T* dy, const R* dr, const float* w, float mu, float rs,
                  bool centre, const float* z, RowGradients<T, R> out, int64_t N) {
  float c1 = 0, c2 = 0;
  const auto gradient = [&](int64_t j, auto part, f32v* g, f32v* xhat, f32v* wdy) {
    *g = part.load(dy + j), *xhat = (part.load(r + j) - mu) * rs;
    *wdy = w ? *g * part.load(w + j) : *g;
  };
  if (dy) {
    float sums[2];
    sum_vectors(N, sums, [&](int64_t j, auto part, f32v* totals) {
      __builtin_prefetch(r + N + j);
      __builtin_prefetch(dy + N + j);
      f32v g, xhat, wdy;
      gradient(j, part, &g, &xhat, &wdy);
      if (out.dw) part.store(out.dw + j, part.load(out.dw + j) + g * xhat);
      if (out.db) part.store(out.db + j, part.load(out.db + j) + g);
      totals[0] += wdy * xhat;  // lanes past the end hold g = 0
      totals[1] += wdy;
    });
    c1 = sums[0] / N;
    if (centre) c2 = sums[1] / N;
  }
  if (!out.dresidual && !out.dx && !out.dx_bias) return;
  for_each_vector(N, [&](int64_t j, auto part) {
    f32v total{};
    if (dy) {  // the same as above once more, which takes less than keeping them
      f32v g, xhat, wdy;
      gradient(j, part, &g, &xhat, &wdy);
      total = (wdy - c1 * xhat - c2) * rs;
    }
    if (dr) {
      __builtin_prefetch(dr + N + j);
      total += part.load(dr + j);
    }
    if (out.dresidual) part.store(out.dresidual + j, total);
    if (z) total *= part.load(z + j);
    if (out.dx) part.store(out.dx + j, total);
    if (out.dx_bias) part.store(out.dx_bias + j, part.load(out.dx_bias + j) + total);
  });
}

template <class T, class R>
void backward(const R* r, const T* dy, const R* dr, const float* w, const float* mean,
              const float* rstd, R* dresidual, T* dx, float* const sums[3], float* partial,
              int64_t blocks, int64_t M, int64_t N, const RowDropout& dropout) {
  const bool parameters = sums[0] || sums[1] || sums[2];
  const bool needs_z = dx || sums[2];
  const int64_t grain = (rows_per_thread(N) * blocks + M - 1) / (M ? M : 1);
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* part[3] = {};
      for (int k = 0; k < 3; ++k)
        if (sums[k]) {
          part[k] = partial + (block * 3 + k) * N;
          std::memset(part[k], 0, N * sizeof(float));
        }
      for (int64_t i = block * M / blocks; i < (block + 1) * M / blocks; ++i) {
        const RowGradients<T, R> out{dresidual ? dresidual + i * N : nullptr,
                                     dx ? dx + i * N : nullptr, part[0], part[1], part[2]};
        backward_row(r + i * N, dy ? dy + i * N : nullptr, dr ? dr + i * N : nullptr, w,
                     mean ? mean[i] : 0.0f, rstd[i], mean != nullptr,
                     needs_z ? dropout.row(i, N) : nullptr, out, N);
      }
    }
  });
  if (!parameters) return;
  parallel_for(N, kGrainElements / blocks + W, [&](int64_t begin, int64_t end) {
    for (int k = 0; k < 3; ++k)
      if (sums[k])
        for_each_vector(end - begin, [&](int64_t j, auto part) {
          f32v sum{};
          for (int64_t block = 0; block < blocks; ++block)
            sum += part.load(partial + (block * 3 + k) * N + begin + j);
          part.store(sums[k] + begin + j, sum);
        });
  });
}

void norm_fwd(const void* x, const void* residual, const float* x_bias, const float* w,
              const float* b, void* y, void* r, float* mean, float* rstd, int64_t M, int64_t N,
              float eps, int64_t threshold, int64_t seed, DType x_dtype, DType r_dtype) {
  with_stream_dtype(x_dtype, r_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using R = decltype(s);
    forward(static_cast<const T*>(x), static_cast<const R*>(residual), x_bias, w, b,
            static_cast<T*>(y), static_cast<R*>(r), mean, rstd, M, N, eps,
            RowDropout(threshold, seed));
  });
}

void norm_bwd(const void* r, const void* dy, const void* dr, const float* w, const float* mean,
              const float* rstd, void* dresidual, void* dx, float* dw, float* db, float* dx_bias,
              float* partial, int64_t blocks, int64_t M, int64_t N, int64_t threshold, int64_t seed,
              DType x_dtype, DType r_dtype) {
  float* const sums[3] = {dw, db, dx_bias};
  with_stream_dtype(x_dtype, r_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using R = decltype(s);
    backward(static_cast<const R*>(r), static_cast<const T*>(dy), static_cast<const R*>(dr), w,
             mean, rstd, static_cast<R*>(dresidual), static_cast<T*>(dx), sums, partial, blocks, M,
             N, RowDropout(threshold, seed));
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(norm_fwd)
REGISTER_KERNEL(norm_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_layer_norm(pybind11::module_& m) {
  gptfast::bind_kernel(m, "norm_fwd", gptfast::kernel_norm_fwd);
  gptfast::bind_kernel(m, "norm_bwd", gptfast::kernel_norm_bwd);
}
#endif
