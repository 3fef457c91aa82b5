// GELU, y = z Phi(z), and its gradient, elementwise: z = x, or x + bias along rows. The maths stands
// in gptfast/ops/gelu.py and gptfast/ops/bias_gelu.py.
//
// Without a bias a thread computes kPacks packs of 16 bytes, a block's packs in turns, so that
// neighbouring threads read neighbouring packs. Forward reads x and writes y once, backward reads dy
// and x and writes dx once; what is left at the end of n, or is not aligned, goes element by element.
//
// With a bias a thread has the columns of one pack, and walks over rows. dbias is summed in two
// stages, without atomics: `programs` rows of blocks each sum their rows, a second kernel adds those.
#include "activation.cuh"
#include "column_sums.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // in flight per thread: 32 bytes a tensor

// Calls body(i, whole, count) for this thread's packs of n elements: `count` from i on, which `whole`
// says are kWidth and aligned.
template <int kWidth, class Body>
__device__ __forceinline__ void for_each_pack(int64_t n, bool aligned, const Body& body) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kPacks * kWidth);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = first + (k * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
    if (i < n) body(i, aligned && i + kWidth <= n, n - i);
  }
}

template <class Form, class T>
__global__ void __launch_bounds__(kThreads)
    gelu_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t n, bool aligned) {
  constexpr int kWidth = kFullWidth<T>;
  for_each_pack<kWidth>(n, aligned, [&](int64_t i, bool whole, int64_t count) {
    auto pack = load_some<kWidth>(x + i, whole, count);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.set(k, Form::value(pack[k]));
    store_some(y + i, pack, whole, count);
  });
}

template <class Form, class T>
__global__ void __launch_bounds__(kThreads)
    gelu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx,
                    int64_t n, bool aligned) {
  constexpr int kWidth = kFullWidth<T>;
  for_each_pack<kWidth>(n, aligned, [&](int64_t i, bool whole, int64_t count) {
    auto pack = load_some<kWidth>(x + i, whole, count);
    const auto grad = load_some<kWidth>(dy + i, whole, count);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.set(k, grad[k] * Form::slope(pack[k]));
    store_some(dx + i, pack, whole, count);
  });
}

// Calls body(form, storage type, grid).
template <class Body>
void dispatch(int64_t n, bool tanh_form, DType dtype, const Body& body) {
  if (n == 0) return;
  with_dtype(dtype, [&](auto t) {
    const int64_t elements = kThreads * kPacks * kFullWidth<decltype(t)>;
    const dim3 grid(grid_of(ceil_div(n, elements)));
    with_gelu(tanh_form, [&](auto form) { body(form, t, grid); });
  });
}

// ---- With a bias ------------------------------------------------------------------------------------

constexpr int kRows = 8;  // of a block: a warp each

// A block's columns stand in a warp's packs, its rows in its warps; blockIdx.y: its program. Calls
// body(first element of a pack) for each of this thread's rows.
template <class Body>
__device__ __forceinline__ void for_each_row(int64_t M, int64_t N, int64_t c, const Body& body) {
  const int64_t step = int64_t{gridDim.y} * kRows;
#pragma unroll 2
  for (int64_t i = int64_t{blockIdx.y} * kRows + threadIdx.y; i < M; i += step) body(i * N + c);
}

template <int kWidth>
__device__ __forceinline__ void load_bias(const Parameter& bias, int64_t c, bool whole,
                                          int64_t count, float (&out)[kWidth]) {
  if (whole) return bias.load(c, out, 0.0f);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) out[k] = k < count ? bias.at(c + k) : 0.0f;
}

template <class Form, class T>
__global__ void __launch_bounds__(32 * kRows)
    bias_gelu_fwd_kernel(const T* __restrict__ x, Parameter bias, T* __restrict__ y, int64_t M,
                         int64_t N, bool whole) {
  constexpr int kWidth = kFullWidth<T>;
  const int64_t c = (int64_t{blockIdx.x} * 32 + threadIdx.x) * kWidth;
  if (c >= N) return;
  float b[kWidth];
  load_bias(bias, c, whole, N - c, b);
  for_each_row(M, N, c, [&](int64_t i) {
    auto pack = load_some<kWidth>(x + i, whole, N - c);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.set(k, Form::value(pack[k] + b[k]));
    store_some(y + i, pack, whole, N - c);
  });
}

// dx may be null, and so may partial, (programs, N).
template <class Form, class T>
__global__ void __launch_bounds__(32 * kRows)
    bias_gelu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, Parameter bias,
                         T* __restrict__ dx, float* __restrict__ partial, int64_t M, int64_t N,
                         bool whole) {
  constexpr int kWidth = kFullWidth<T>;
  __shared__ float of_row[kRows][32 * kWidth];
  const int64_t c = (int64_t{blockIdx.x} * 32 + threadIdx.x) * kWidth;
  float sum[kWidth] = {};
  if (c < N) {
    float b[kWidth];
    load_bias(bias, c, whole, N - c, b);
    for_each_row(M, N, c, [&](int64_t i) {
      auto pack = load_some<kWidth>(x + i, whole, N - c);
      const auto grad = load_some<kWidth>(dy + i, whole, N - c);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float dz = grad[k] * Form::slope(pack[k] + b[k]);
        sum[k] += dz;
        pack.set(k, dz);
      }
      if (dx) store_some(dx + i, pack, whole, N - c);
    });
  }
  if (!partial) return;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) of_row[threadIdx.y][k * 32 + threadIdx.x] = sum[k];
  __syncthreads();
  if (threadIdx.y != 0 || c >= N) return;
  partial += int64_t{blockIdx.y} * N + c;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    for (int row = 1; row < kRows; ++row) sum[k] += of_row[row][k * 32 + threadIdx.x];
    if (c + k < N) partial[k] = sum[k];
  }
}

// Calls body(form, storage type, grid, whole) for rows of N elements; whole: N is of whole packs.
template <class Body>
void dispatch_rows(bool aligned, int64_t N, int64_t programs, bool tanh_form, DType dtype,
                   const Body& body) {
  with_dtype(dtype, [&](auto t) {
    constexpr int64_t kWidth = kFullWidth<decltype(t)>;
    const dim3 grid(grid_of(ceil_div(N, 32 * kWidth)), static_cast<unsigned>(programs));
    with_gelu(tanh_form, [&](auto form) { body(form, t, grid, aligned && N % kWidth == 0); });
  });
}

}  // namespace

void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype, cudaStream_t stream) {
  dispatch(n, tanh_form, dtype, [&](auto form, auto t, dim3 grid) {
    using T = decltype(t);
    LAUNCH((gelu_fwd_kernel<decltype(form), T>), grid, kThreads, 0, stream,
           static_cast<const T*>(x), static_cast<T*>(y), n, aligned_16(x, y));
  });
}

void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype,
              cudaStream_t stream) {
  dispatch(n, tanh_form, dtype, [&](auto form, auto t, dim3 grid) {
    using T = decltype(t);
    LAUNCH((gelu_bwd_kernel<decltype(form), T>), grid, kThreads, 0, stream,
           static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n,
           aligned_16(dy, x, dx));
  });
}

void bias_gelu_fwd(const void* x, const void* bias, DType bias_dtype, void* y, int64_t M, int64_t N,
                   bool tanh_form, DType dtype, cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  // Four rows a thread: enough to read the bias once for many, few enough to fill the card.
  const int64_t most = 65535, programs = ceil_div(M, int64_t{4 * kRows});
  dispatch_rows(aligned_16(x, bias, y), N, programs < most ? programs : most, tanh_form, dtype,
                [&](auto form, auto t, dim3 grid, bool whole) {
                  using T = decltype(t);
                  LAUNCH((bias_gelu_fwd_kernel<decltype(form), T>), grid, dim3(32, kRows), 0,
                         stream, static_cast<const T*>(x), (Parameter{bias, bias_dtype}),
                         static_cast<T*>(y), M, N, whole);
                });
}

void bias_gelu_bwd(const void* dy, const void* x, const void* bias, DType bias_dtype, void* dx,
                   float* db, float* partial, int64_t programs, int64_t M, int64_t N,
                   bool tanh_form, DType dtype, cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  dispatch_rows(aligned_16(dy, x, bias, dx), N, programs, tanh_form, dtype,
                [&](auto form, auto t, dim3 grid, bool whole) {
                  using T = decltype(t);
                  LAUNCH((bias_gelu_bwd_kernel<decltype(form), T>), grid, dim3(32, kRows), 0,
                         stream, static_cast<const T*>(dy), static_cast<const T*>(x),
                         (Parameter{bias, bias_dtype}), static_cast<T*>(dx), db ? partial : nullptr,
                         M, N, whole);
                });
  if (db) add_column_sums(partial, {{db}}, 1, programs, N, stream);
}

}  // namespace gptfast::cuda
