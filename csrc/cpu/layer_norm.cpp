// LayerNorm over the last dimension of x (M rows, N columns), and its gradients.
//
//   mean = sum_j x_j / N,  rstd = 1 / sqrt(sum_j (x_j - mean)^2 / N + eps)
//   xhat = (x - mean) rstd,  y = xhat w + b
//   wdy = dy w,  c1 = mean_j(wdy xhat),  c2 = mean_j(wdy)
//   dx = (wdy - c1 xhat - c2) rstd,  dw = sum_i dy xhat,  db = sum_i dy
//
// Forward reads x and writes y once (the second and third sweep over a row hit the first-level
// cache). Backward reads dy and x once and writes dx once. dw and db are summed in two stages: each
// block of rows into its own fp32 row of `partial`, then those rows in order, so the result does
// not depend on the number of threads.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

// w and b may be null. mean and rstd are (M,) fp32.
DECLARE_KERNEL(layer_norm_fwd,
               void(const void* x, const float* w, const float* b, void* y, float* mean,
                    float* rstd, int64_t M, int64_t N, float eps, DType dtype))
// dx, dw and db may be null: that gradient is then not computed. partial is (blocks, 2, N) fp32,
// needed when dw or db is: block i covers rows [i M / blocks, (i + 1) M / blocks).
DECLARE_KERNEL(layer_norm_bwd,
               void(const void* dy, const void* x, const float* w, const float* mean,
                    const float* rstd, void* dx, float* dw, float* db, float* partial,
                    int64_t blocks, int64_t M, int64_t N, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;

inline int64_t rows_per_thread(int64_t N) {
  return N > kGrainElements ? 1 : kGrainElements / (N + 1) + 1;
}

template <class T>
void forward(const T* x, const float* w, const float* b, T* y, float* mean, float* rstd, int64_t M,
             int64_t N, float eps) {
  parallel_for(M, rows_per_thread(N), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = x + i * N;
      f32v sum{};
      for_each_vector(N, [&](int64_t j, auto part) { sum += part.load(row + j); });
      const float mu = reduce_add(sum) / N;

      f32v squares{};
      for_each_vector(N, [&](int64_t j, auto part) {
        const f32v centred = part.live(part.load(row + j) - mu, f32v{});
        squares += centred * centred;
      });
      const float rs = 1.0f / std::sqrt(reduce_add(squares) / N + eps);

      T* out = y + i * N;
      for_each_vector(N, [&](int64_t j, auto part) {
        f32v v = (part.load(row + j) - mu) * rs;
        if (w) v *= part.load(w + j);
        if (b) v += part.load(b + j);
        part.store(out + j, v);
      });
      mean[i] = mu;
      rstd[i] = rs;
    }
  });
}

template <class T>
void input_gradient_row(const T* dy, const T* x, const float* w, float mu, float rs, T* dx,
                        int64_t N) {
  f32v sum1{}, sum2{};
  for_each_vector(N, [&](int64_t j, auto part) {
    const f32v xhat = (part.load(x + j) - mu) * rs;
    f32v wdy = part.load(dy + j);
    if (w) wdy *= part.load(w + j);
    sum1 += wdy * xhat;  // lanes past the end hold wdy = 0
    sum2 += wdy;
  });
  const float c1 = reduce_add(sum1) / N, c2 = reduce_add(sum2) / N;
  for_each_vector(N, [&](int64_t j, auto part) {
    const f32v xhat = (part.load(x + j) - mu) * rs;
    f32v wdy = part.load(dy + j);
    if (w) wdy *= part.load(w + j);
    part.store(dx + j, (wdy - c1 * xhat - c2) * rs);
  });
}

template <class T>
void backward(const T* dy, const T* x, const float* w, const float* mean, const float* rstd, T* dx,
              float* dw, float* db, float* partial, int64_t blocks, int64_t M, int64_t N) {
  const bool parameters = dw || db;
  const int64_t grain = (rows_per_thread(N) * blocks + M - 1) / (M ? M : 1);
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dw_part = parameters ? partial + block * 2 * N : nullptr;
      float* db_part = parameters ? dw_part + N : nullptr;
      if (parameters) std::memset(dw_part, 0, 2 * N * sizeof(float));
      for (int64_t i = block * M / blocks; i < (block + 1) * M / blocks; ++i) {
        const float mu = mean[i], rs = rstd[i];
        if (dx) input_gradient_row(dy + i * N, x + i * N, w, mu, rs, dx + i * N, N);
        if (parameters)
          for_each_vector(N, [&](int64_t j, auto part) {
            const f32v g = part.load(dy + i * N + j);
            const f32v xhat = (part.load(x + i * N + j) - mu) * rs;
            part.store(dw_part + j, part.load(dw_part + j) + g * xhat);
            part.store(db_part + j, part.load(db_part + j) + g);
          });
      }
    }
  });
  if (!parameters) return;
  parallel_for(N, kGrainElements / blocks + W, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t j, auto part) {
      f32v dw_sum{}, db_sum{};
      for (int64_t block = 0; block < blocks; ++block) {
        dw_sum += part.load(partial + block * 2 * N + begin + j);
        db_sum += part.load(partial + (block * 2 + 1) * N + begin + j);
      }
      if (dw) part.store(dw + begin + j, dw_sum);
      if (db) part.store(db + begin + j, db_sum);
    });
  });
}

void layer_norm_fwd(const void* x, const float* w, const float* b, void* y, float* mean,
                    float* rstd, int64_t M, int64_t N, float eps, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(x), w, b, static_cast<T*>(y), mean, rstd, M, N, eps);
  });
}

void layer_norm_bwd(const void* dy, const void* x, const float* w, const float* mean,
                    const float* rstd, void* dx, float* dw, float* db, float* partial,
                    int64_t blocks, int64_t M, int64_t N, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    backward(static_cast<const T*>(dy), static_cast<const T*>(x), w, mean, rstd,
             static_cast<T*>(dx), dw, db, partial, blocks, M, N);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(layer_norm_fwd)
REGISTER_KERNEL(layer_norm_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_layer_norm(pybind11::module_& m) {
  gptfast::bind_kernel(m, "layer_norm_fwd", gptfast::kernel_layer_norm_fwd);
  gptfast::bind_kernel(m, "layer_norm_bwd", gptfast::kernel_layer_norm_bwd);
}
#endif
