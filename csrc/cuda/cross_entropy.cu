// Cross-entropy of each row of logits x (M rows, V columns) with its target class, and its gradient.
// The maths stands in gptfast/ops/cross_entropy.py.
//
// One block per row. Forward reads the logits once, each thread with a running maximum and sum of
// its own; backward reads x and writes dx once. Rows are swept by packs of 16 bytes, with single
// elements before the first aligned address and behind the last: an odd V, as GPT-2's, moves every
// row against the packs.
#include "common.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

constexpr int kMaxThreads = 1024;  // of one block: for a second one ptxas would spill

// A row's scalars, from x: z = x, or k tanh(x / k) with a softcap k (0: none).
struct Softcap {
  float k;
  __device__ __forceinline__ float value(float x) const { return k == 0.0f ? x : k * tanhf(x / k); }
  // dz/dx = 1 / cosh(x / k)^2: not 1 - (z / k)^2, which cancels where z is close to k.
  __device__ __forceinline__ float slope(float x) const {
    if (k == 0.0f) return 1.0f;
    const float e = expf(-fabsf(x / k)), s = 1.0f + e * e;
    return 4 * e * e / (s * s);
  }
};

// Calls body(column, width constant) for every pack, and every single element, of this thread.
template <class T, class Body>
__device__ __forceinline__ void sweep(const T* row, int64_t V, const Body& body) {
  constexpr int kWidth = kFullWidth<T>;
  const int thread = threadIdx.x;
  const int64_t ahead = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
  const int64_t head = ahead < V ? ahead : V;
  const int64_t tail = head + (V - head) / kWidth * kWidth;
  if (thread < head) body(int64_t{thread}, std::integral_constant<int, 1>{});
  for (int64_t c = head + thread * kWidth; c < tail; c += blockDim.x * kWidth)
    body(c, std::integral_constant<int, kWidth>{});
  if (thread < V - tail) body(tail + thread, std::integral_constant<int, 1>{});
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_fwd_kernel(const T* x, const int64_t* target, Parameter w, float* loss,
                             float* lse, int64_t V, int64_t ignore_index, float smoothing,
                             float z_loss, Softcap softcap) {
  const int64_t row = blockIdx.x, t = target[row];
  if (t == ignore_index) {  // the whole block leaves
    if (threadIdx.x == 0) loss[row] = lse[row] = 0.0f;
    return;
  }
  x += row * V;
  float top = Max::kNeutral, sum = 0.0f;
  float weighted[2] = {};  // sum_c w_c and sum_c w_c z_c
  sweep(x, V, [&](int64_t c, auto width) {
    const auto pack = load<width>(x + c);
    float z[width], highest = top;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      z[k] = softcap.value(pack[k]);
      highest = fmaxf(highest, z[k]);
    }
    sum *= expf(top - highest);
    top = highest;
#pragma unroll
    for (int k = 0; k < width; ++k) sum += expf(z[k] - top);
    if (smoothing != 0.0f) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float weight = w.data ? w.at(c + k) : 1.0f;
        weighted[0] += weight;
        weighted[1] += weight * z[k];
      }
    }
  });
  float highest[1] = {top};
  row_reduce<Max>(highest);
  float total[1] = {sum * expf(top - highest[0])};
  row_reduce<Sum>(total);
  if (smoothing != 0.0f) row_reduce<Sum>(weighted);
  if (threadIdx.x != 0) return;
  const float row_lse = highest[0] + logf(total[0]);
  const bool known = t >= 0 && t < V;
  const float weight = w.data && known ? w.at(t) : 1.0f;
  float value = known ? (1 - smoothing) * weight * (row_lse - softcap.value(to_float(x[t]))) : NAN;
  if (smoothing != 0.0f) value += smoothing / V * (weighted[0] * row_lse - weighted[1]);
  if (z_loss != 0.0f) value += z_loss * row_lse * row_lse;
  loss[row] = value;
  lse[row] = row_lse;
}

// dx may be x.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_bwd_kernel(const float* dloss, const T* x, const int64_t* target, Parameter w,
                             const float* w_sum, const float* lse, T* dx, int64_t V,
                             int64_t ignore_index, float smoothing, float z_loss, Softcap softcap) {
  const int64_t row = blockIdx.x, t = target[row];
  x += row * V;
  dx += row * V;
  const bool ignored = t == ignore_index;
  const float g = ignored ? 0.0f : dloss[row], row_lse = lse[row], spread = smoothing / V;
  const float hit = (1 - smoothing) * (w.data && t >= 0 && t < V ? w.at(t) : 1.0f);
  const float share = hit + (w.data ? spread * *w_sum : smoothing) + 2 * z_loss * row_lse;
  sweep(dx, V, [&](int64_t c, auto width) {
    auto pack = load_any<width>(x + c);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float logit = pack[k];
      float dz = share * expf(softcap.value(logit) - row_lse);
      if (smoothing != 0.0f) dz -= spread * (w.data ? w.at(c + k) : 1.0f);
      if (c + k == t) dz -= hit;
      pack.set(k, ignored ? 0.0f : g * dz * softcap.slope(logit));
    }
    store_result(dx + c, pack);
  });
}

// 8 packs a thread keep the sum over the block's threads small beside the sweep.
template <class T>
unsigned threads_for(int64_t V) {
  const int64_t warps = ceil_div(V, int64_t{8 * kFullWidth<T> * 32});
  return 32 * static_cast<unsigned>(warps < 1 ? 1 : warps > 32 ? 32 : warps);
}

}  // namespace

void cross_entropy_fwd(const void* x, const int64_t* target, const void* w, DType w_dtype,
                       float* loss, float* lse, int64_t M, int64_t V, int64_t ignore_index,
                       float smoothing, float z_loss, float softcap, DType dtype,
                       cudaStream_t stream) {
  if (M == 0) return;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    LAUNCH((cross_entropy_fwd_kernel<T>), grid_of(M), threads_for<T>(V), 0, stream,
           static_cast<const T*>(x), target, (Parameter{w, w_dtype}), loss, lse, V, ignore_index,
           smoothing, z_loss, Softcap{softcap});
  });
}

void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target, const void* w,
                       DType w_dtype, const float* w_sum, const float* lse, void* dx, int64_t M,
                       int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                       float softcap, DType dtype, cudaStream_t stream) {
  if (M == 0 || V == 0) return;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    LAUNCH((cross_entropy_bwd_kernel<T>), grid_of(M), threads_for<T>(V), 0, stream, dloss,
           static_cast<const T*>(x), target, (Parameter{w, w_dtype}), w_sum, lse,
           static_cast<T*>(dx), V, ignore_index, smoothing, z_loss, Softcap{softcap});
  });
}

}  // namespace gptfast::cuda
