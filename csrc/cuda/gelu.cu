// GELU, y = x Phi(x), and its gradient, elementwise. The maths stands in gptfast/ops/gelu.py.
//
// A thread computes kPacks packs of 16 bytes, a block's packs in turns, so that neighbouring threads
// read neighbouring packs. Forward reads x and writes y once, backward reads dy and x and writes dx
// once; what is left at the end of n, or is not aligned, goes element by element.
#include "common.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // in flight per thread: 32 bytes a tensor
constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

struct TanhForm {
  static __device__ __forceinline__ float value(float x) {
    return x / (1.0f + expf(-kTwoSqrt2OverPi * (x + kCubic * x * x * x)));
  }
  static __device__ __forceinline__ float slope(float x) {
    // Beyond |x| = 10 the slope is 0 or 1: leaving x out there keeps x^2 from overflowing.
    const float c = fabsf(x) > 10.0f ? copysignf(10.0f, x) : x;
    // s and 1 - s = e s from one exponential: 1 - s by subtraction would lose digits that the large
    // factors bring back.
    const float e = expf(-kTwoSqrt2OverPi * (c + kCubic * c * c * c));
    const float s = 1.0f / (1.0f + e);
    return s + c * s * (e * s) * (kTwoSqrt2OverPi * (1.0f + 3 * kCubic * c * c));
  }
};

struct ErfForm {
  static __device__ __forceinline__ float phi(float x) { return 0.5f * erfcf(-x * kSqrtHalf); }
  static __device__ __forceinline__ float value(float x) { return x * phi(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float c = fabsf(x) > 15.0f ? copysignf(15.0f, x) : x;
    return phi(x) + c * (kInvSqrt2Pi * expf(-0.5f * c * c));
  }
};

// Calls body(i, width constant) for what this thread computes of n elements.
template <int kWidth, class Body>
__device__ __forceinline__ void for_each_pack(int64_t n, const Body& body) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kPacks * kWidth);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = first + (k * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
    if (i + kWidth <= n) {
      body(i, std::integral_constant<int, kWidth>{});
    } else {
      for (int64_t j = i; j < n; ++j) body(j, std::integral_constant<int, 1>{});
    }
  }
}

template <class Form, class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    gelu_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t n) {
  for_each_pack<kWidth>(n, [&](int64_t i, auto width) {
    auto pack = load<width>(x + i);
#pragma unroll
    for (int k = 0; k < width; ++k) pack.set(k, Form::value(pack[k]));
    store(y + i, pack);
  });
}

template <class Form, class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    gelu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx,
                    int64_t n) {
  for_each_pack<kWidth>(n, [&](int64_t i, auto width) {
    auto pack = load<width>(x + i);
    const auto grad = load<width>(dy + i);
#pragma unroll
    for (int k = 0; k < width; ++k) pack.set(k, grad[k] * Form::slope(pack[k]));
    store(dx + i, pack);
  });
}

// Calls body(form, storage type, width constant, grid).
template <class Body>
void dispatch(bool aligned, int64_t n, bool tanh_form, DType dtype, const Body& body) {
  if (n == 0) return;
  with_dtype(dtype, [&](auto t) {
    with_width<decltype(t)>(aligned, 0, [&](auto width) {
      const dim3 grid(grid_of(ceil_div(n, int64_t{kThreads * kPacks * width})));
      tanh_form ? body(TanhForm{}, t, width, grid) : body(ErfForm{}, t, width, grid);
    });
  });
}

}  // namespace

void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype, cudaStream_t stream) {
  dispatch(aligned_16(x, y), n, tanh_form, dtype, [&](auto form, auto t, auto width, dim3 grid) {
    using T = decltype(t);
    LAUNCH((gelu_fwd_kernel<decltype(form), T, width>), grid, kThreads, 0, stream,
           static_cast<const T*>(x), static_cast<T*>(y), n);
  });
}

void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype,
              cudaStream_t stream) {
  dispatch(aligned_16(dy, x, dx), n, tanh_form, dtype,
           [&](auto form, auto t, auto width, dim3 grid) {
             using T = decltype(t);
             LAUNCH((gelu_bwd_kernel<decltype(form), T, width>), grid, kThreads, 0, stream,
                    static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n);
           });
}

}  // namespace gptfast::cuda
