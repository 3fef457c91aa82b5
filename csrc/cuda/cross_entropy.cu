// Cross-entropy of each row of logits x (M rows, V columns) with its target class, and its gradient.
// The maths stands in gptfast/ops/cross_entropy.py.
//
// One block per row. Forward reads the logits once, each thread with a running maximum and sum of
// its own; backward reads x and writes dx once. Both in one, where the gradient of the loss is known
// before, read x once and write dx: shared memory keeps the row in between, or as much of it as it
// has room for. Rows are swept by packs of 16 bytes, with single elements before the first aligned
// address and behind the last: an odd V, as GPT-2's, moves every row against the packs.
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

// The loss, but for its dtype.
struct Rule {
  Parameter w;
  int64_t ignore_index;
  float smoothing, z_loss;
  Softcap softcap;

  __device__ __forceinline__ float weight(int64_t c) const { return w.data ? w.at(c) : 1.0f; }
  // Of the target t. What is none of the V classes makes loss and gradient NaN: a look from the host
  // would wait for the card.
  __device__ __forceinline__ float hit(int64_t t, int64_t V) const {
    return t >= 0 && t < V ? (1 - smoothing) * weight(t) : NAN;
  }
};

// What a row's loss and gradient are made of: of a thread's logits, then of the row's.
struct RowSums {
  float top = Max::kNeutral, sum = 0.0f;
  float weighted[2] = {};  // sum_c w_c and sum_c w_c z_c, where there is smoothing

  template <class T, int kWidth>
  __device__ __forceinline__ void add(const Pack<T, kWidth>& pack, int64_t c, const Rule& rule) {
    float z[kWidth], highest = top;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      z[k] = rule.softcap.value(pack[k]);
      highest = fmaxf(highest, z[k]);
    }
    sum *= expf(top - highest);
    top = highest;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += expf(z[k] - top);
    if (rule.smoothing != 0.0f) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float weight = rule.weight(c + k);
        weighted[0] += weight;
        weighted[1] += weight * z[k];
      }
    }
  }

  // Adds up the block's threads, all of which must come here, and get the row's lse.
  __device__ __forceinline__ float finish(const Rule& rule) {
    float highest[1] = {top};
    row_reduce<Max>(highest);
    float total[1] = {sum * expf(top - highest[0])};
    row_reduce<Sum>(total);
    if (rule.smoothing != 0.0f) row_reduce<Sum>(weighted);
    return highest[0] + logf(total[0]);
  }

  // Of a finished row with its target's logit x_t.
  __device__ __forceinline__ float loss(float lse, float x_t, int64_t t, int64_t V,
                                        const Rule& rule) const {
    float value = rule.hit(t, V) * (lse - rule.softcap.value(x_t));
    if (rule.smoothing != 0.0f) value += rule.smoothing / V * (weighted[0] * lse - weighted[1]);
    if (rule.z_loss != 0.0f) value += rule.z_loss * lse * lse;
    return value;
  }
};

// The gradient of a row with the target t. w_sum: sum_c w_c, where there is smoothing.
struct RowGradient {
  float dloss, lse, hit, spread, share;
  int64_t t;

  __device__ __forceinline__ RowGradient(float dloss, float lse, float w_sum, int64_t t, int64_t V,
                                         const Rule& rule)
      : dloss(dloss),
        lse(lse),
        hit(rule.hit(t, V)),
        spread(rule.smoothing / V),
        share(hit + (rule.w.data ? spread * w_sum : rule.smoothing) + 2 * rule.z_loss * lse),
        t(t) {}

  // Logits become their gradients.
  template <class T, int kWidth>
  __device__ __forceinline__ void apply(Pack<T, kWidth>& pack, int64_t c, const Rule& rule) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float logit = pack[k];
      float dz = share * expf(rule.softcap.value(logit) - lse);
      if (rule.smoothing != 0.0f) dz -= spread * rule.weight(c + k);
      if (c + k == t) dz -= hit;
      pack.set(k, dloss * dz * rule.softcap.slope(logit));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_fwd_kernel(const T* x, const int64_t* target, Rule rule, float* loss, float* lse,
                             int64_t V) {
  const int64_t row = blockIdx.x, t = target[row];
  if (t == rule.ignore_index) {  // the whole block leaves
    if (threadIdx.x == 0) loss[row] = lse[row] = 0.0f;
    return;
  }
  x += row * V;
  RowSums sums;
  sweep(x, V, [&](int64_t c, auto width) { sums.add(load<width>(x + c), c, rule); });
  const float row_lse = sums.finish(rule);
  if (threadIdx.x != 0) return;
  loss[row] = sums.loss(row_lse, t >= 0 && t < V ? to_float(x[t]) : 0.0f, t, V, rule);
  lse[row] = row_lse;
}

template <class T>
__device__ __forceinline__ void clear_row(T* row, int64_t V) {
  sweep(row, V, [&](int64_t c, auto width) { store_result(row + c, Pack<T, width>{}); });
}

// dx may be x.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_bwd_kernel(const float* dloss, const T* x, const int64_t* target, Rule rule,
                             const float* w_sum, const float* lse, T* dx, int64_t V) {
  const int64_t row = blockIdx.x, t = target[row];
  x += row * V;
  dx += row * V;
  if (t == rule.ignore_index) return clear_row(dx, V);
  const RowGradient gradient(dloss[row], lse[row], w_sum ? *w_sum : 0.0f, t, V, rule);
  sweep(dx, V, [&](int64_t c, auto width) {
    auto pack = load_any<width>(x + c);
    gradient.apply(pack, c, rule);
    store_result(dx + c, pack);
  });
}

// Both. The first `kept` columns stay in shared memory, as far from a multiple of 16 bytes as in x; the
// others are read again. dx may be x.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_fused_kernel(const float* dloss, const T* x, const int64_t* target, Rule rule,
                               float* loss, T* dx, int64_t V, int64_t kept) {
  DYN_SMEM(memory);
  const int64_t row = blockIdx.x, t = target[row];
  x += row * V;
  dx += row * V;
  if (t == rule.ignore_index) {
    if (threadIdx.x == 0) loss[row] = 0.0f;
    return clear_row(dx, V);
  }
  T* const cache = reinterpret_cast<T*>(memory + reinterpret_cast<uintptr_t>(x) % 16);
  RowSums sums;
  sweep(x, V, [&](int64_t c, auto width) {
    const auto pack = load<width>(x + c);
    if (c + width <= kept) store(cache + c, pack);
    sums.add(pack, c, rule);
  });
  const float lse = sums.finish(rule);
  if (threadIdx.x == 0)
    loss[row] = sums.loss(lse, t >= 0 && t < V ? to_float(x[t]) : 0.0f, t, V, rule);
  __syncthreads();  // the target's logit has been read
  const RowGradient gradient(dloss[row], lse, sums.weighted[0], t, V, rule);
  sweep(x, V, [&](int64_t c, auto width) {
    auto pack = load<width>((c + width <= kept ? cache : x) + c);
    gradient.apply(pack, c, rule);
    store_any(dx + c, pack);
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
  const Rule rule{{w, w_dtype}, ignore_index, smoothing, z_loss, {softcap}};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    LAUNCH((cross_entropy_fwd_kernel<T>), grid_of(M), threads_for<T>(V), 0, stream,
           static_cast<const T*>(x), target, rule, loss, lse, V);
  });
}

void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target, const void* w,
                       DType w_dtype, const float* w_sum, const float* lse, void* dx, int64_t M,
                       int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                       float softcap, DType dtype, cudaStream_t stream) {
  if (M == 0 || V == 0) return;
  const Rule rule{{w, w_dtype}, ignore_index, smoothing, z_loss, {softcap}};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    LAUNCH((cross_entropy_bwd_kernel<T>), grid_of(M), threads_for<T>(V), 0, stream, dloss,
           static_cast<const T*>(x), target, rule, w_sum, lse, static_cast<T*>(dx), V);
  });
}

void cross_entropy_fused(const float* dloss, const void* x, const int64_t* target, const void* w,
                         DType w_dtype, float* loss, void* dx, int64_t M, int64_t V,
                         int64_t ignore_index, float smoothing, float z_loss, float softcap,
                         int64_t shared_bytes, DType dtype, cudaStream_t stream) {
  if (M == 0) return;
  const Rule rule{{w, w_dtype}, ignore_index, smoothing, z_loss, {softcap}};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t room = (shared_bytes - 16) / static_cast<int64_t>(sizeof(T));
    const int64_t kept = room < 0 ? 0 : room < V ? room : V;
    LAUNCH((cross_entropy_fused_kernel<T>), grid_of(M), threads_for<T>(V), kept * sizeof(T) + 16,
           stream, dloss, static_cast<const T*>(x), target, rule, loss, static_cast<T*>(dx), V,
           kept);
  });
}

}  // namespace gptfast::cuda
