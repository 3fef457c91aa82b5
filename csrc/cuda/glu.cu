// Gated linear units, y = act(gate) up, and their gradients, elementwise. The maths stands in
// gptfast/ops/glu.py.
//
// gate, up and their gradients are M rows of N columns, which may lie apart; y and dy have no gaps. A
// thread computes kPacks packs of 16 bytes of a row, a block's packs in turns. Every tensor is read
// or written once, and the activation is recomputed in backward.
#include "activation.cuh"
#include "launchers.h"

#include <initializer_list>

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // in flight per thread: 32 bytes a tensor

// Calls body(row, column, whole, count) for this thread's packs: `count` elements from the column on,
// which `whole` says are kWidth and aligned.
template <int kWidth, class Body>
__device__ __forceinline__ void for_each_pack(int64_t M, int64_t N, bool aligned,
                                              const Body& body) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kPacks * kWidth);
  for (int64_t row = blockIdx.y; row < M; row += gridDim.y)
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t c = first + (k * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
      if (c < N) body(row, c, aligned && c + kWidth <= N, N - c);
    }
}

template <class Form, class T>
__global__ void __launch_bounds__(kThreads)
    glu_fwd_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y,
                   int64_t stride_gate, int64_t stride_up, int64_t M, int64_t N, bool aligned) {
  constexpr int kWidth = kFullWidth<T>;
  for_each_pack<kWidth>(M, N, aligned, [&](int64_t row, int64_t c, bool whole, int64_t count) {
    auto pack = load_some<kWidth>(gate + row * stride_gate + c, whole, count);
    const auto factor = load_some<kWidth>(up + row * stride_up + c, whole, count);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.set(k, Form::value(pack[k]) * factor[k]);
    store_some(y + row * N + c, pack, whole, count);
  });
}

// dgate and dup may be null.
template <class Form, class T>
__global__ void __launch_bounds__(kThreads)
    glu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ gate, const T* __restrict__ up,
                   T* __restrict__ dgate, T* __restrict__ dup, int64_t stride_gate,
                   int64_t stride_up, int64_t stride_grad, int64_t M, int64_t N, bool aligned) {
  constexpr int kWidth = kFullWidth<T>;
  for_each_pack<kWidth>(M, N, aligned, [&](int64_t row, int64_t c, bool whole, int64_t count) {
    const auto grad = load_some<kWidth>(dy + row * N + c, whole, count);
    const auto g = load_some<kWidth>(gate + row * stride_gate + c, whole, count);
    Pack<T, kWidth> out;
    if (dgate) {
      const auto factor = load_some<kWidth>(up + row * stride_up + c, whole, count);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.set(k, grad[k] * factor[k] * Form::slope(g[k]));
      store_some(dgate + row * stride_grad + c, out, whole, count);
    }
    if (dup) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.set(k, grad[k] * Form::value(g[k]));
      store_some(dup + row * stride_grad + c, out, whole, count);
    }
  });
}

// Calls body(form, storage type, grid, aligned); strides: all that lie between rows.
template <class Body>
void dispatch(bool aligned, std::initializer_list<int64_t> strides, int64_t M, int64_t N,
              int activation, DType dtype, const Body& body) {
  if (M == 0 || N == 0) return;
  int64_t all = 0;  // a power of two divides all where it divides this
  if (M > 1)
    for (const int64_t stride : strides) all |= stride;
  with_dtype(dtype, [&](auto t) {
    constexpr int64_t kWidth = kFullWidth<decltype(t)>;
    const unsigned blocks = grid_of(ceil_div(N, kThreads * kPacks * kWidth));
    const dim3 grid(blocks, static_cast<unsigned>(M < 65535 ? M : 65535));
    with_activation(activation,
                    [&](auto form) { body(form, t, grid, aligned && all % kWidth == 0); });
  });
}

}  // namespace

void glu_fwd(const void* gate, const void* up, void* y, int64_t stride_gate, int64_t stride_up,
             int64_t M, int64_t N, int activation, DType dtype, cudaStream_t stream) {
  dispatch(aligned_16(gate, up, y), {stride_gate, stride_up, N}, M, N, activation, dtype,
           [&](auto form, auto t, dim3 grid, bool aligned) {
             using T = decltype(t);
             LAUNCH((glu_fwd_kernel<decltype(form), T>), grid, kThreads, 0, stream,
                    static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y),
                    stride_gate, stride_up, M, N, aligned);
           });
}

void glu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
             int64_t stride_gate, int64_t stride_up, int64_t stride_grad, int64_t M, int64_t N,
             int activation, DType dtype, cudaStream_t stream) {
  dispatch(aligned_16(dy, gate, up, dgate, dup), {stride_gate, stride_up, stride_grad, N}, M, N,
           activation, dtype, [&](auto form, auto t, dim3 grid, bool aligned) {
             using T = decltype(t);
             LAUNCH((glu_bwd_kernel<decltype(form), T>), grid, kThreads, 0, stream,
                    static_cast<const T*>(dy), static_cast<const T*>(gate),
                    static_cast<const T*>(up), static_cast<T*>(dgate), static_cast<T*>(dup),
                    stride_gate, stride_up, stride_grad, M, N, aligned);
           });
}

}  // namespace gptfast::cuda
