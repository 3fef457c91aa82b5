// AdamW over any number of tensors, in two launches. The maths stands in gptfast/ops/adamw.py, as does
// the table of tensors that tells where they are.
//
// Every tensor is cut into chunks. The first kernel counts the steps, works out each tensor's scalars,
// and, where the gradients are clipped, sums their squares: each of at most 1024 blocks those of its
// chunks i, i + blocks, ... In the second a block updates one chunk; it adds the blocks' sums up by
// itself, 4 KB from the L2 cache, which is less than a launch in between would cost.
//
// Bytes of an element, in fp32: p, g, m and v are read and p, m and v written, 28; clipping reads g
// once more. With a master copy the update reads that instead of p, and writes both.
#include "launchers.h"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;  // elements a thread takes at a time: 16 bytes of a half precision
constexpr float kClipEps = 1e-6f;  // CLIP_EPS in gptfast/ops/adamw.py

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
// What one tensor's elements are computed with; `sign` is still to be scaled and clipped.
struct alignas(16) Scalars {
  float sign, one_minus_beta1, beta2, one_minus_beta2, decay, size, inverse_root, eps;
};

// What both kernels are told. chunks: of `chunk` elements, a multiple of kWidth. grad_scale,
// found_inf: one number each, or null.
struct Step {
  const Tensor* tensors;
  const Chunk* chunks;
  const Group* groups;
  int64_t n_tensors, n_chunks, chunk;
  const float *grad_scale, *found_inf;
  const int64_t* rounding_seed;  // one number, or null

  __device__ __forceinline__ bool skipped() const { return found_inf && *found_inf != 0.0f; }
};

// Calls body(element, width constant) for this thread's share of a chunk.
template <class Body>
__device__ __forceinline__ void for_each_pack(const Tensor& t, int64_t number, int64_t chunk,
                                              const Body& body) {
  const int64_t begin = number * chunk;
  const int64_t end = begin + chunk < t.numel ? begin + chunk : t.numel;
  const int64_t whole = t.aligned ? begin + (end - begin) / kWidth * kWidth : begin;
  const int thread = threadIdx.x;
  for (int64_t i = begin + thread * kWidth; i < whole; i += kThreads * kWidth)
    body(i, std::integral_constant<int, kWidth>{});
  for (int64_t i = whole + thread; i < end; i += kThreads)
    body(i, std::integral_constant<int, 1>{});
}

template <int kPack>
__device__ __forceinline__ void load_coded(int64_t address, int64_t code, int64_t i,
                                           float (&out)[kPack]) {
  const Parameter data{reinterpret_cast<const void*>(address), static_cast<DType>(code)};
  data.load(i, out, 0.0f);
}

template <class T, int kPack>
__device__ __forceinline__ void store_as(int64_t address, int64_t i, const float (&x)[kPack]) {
  Pack<T, kPack> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.set(k, x[k]);
  store(reinterpret_cast<T*>(address) + i, pack);
}

template <int kPack>
__device__ __forceinline__ void store_coded(int64_t address, int64_t code, int64_t i,
                                            const float (&x)[kPack]) {
  switch (static_cast<DType>(code)) {
    case DType::F32: return store_as<float>(address, i, x);
    case DType::BF16: return store_as<__nv_bfloat16>(address, i, x);
    default: return store_as<__half>(address, i, x);
  }
}

// Each x as one of the two bfloat16 numbers around it; element i is the first.
template <int kPack>
__device__ __forceinline__ void round_at_random(const Step& a, int64_t tensor, const Tensor& t,
                                                int64_t i, float (&x)[kPack]) {
  const auto step = static_cast<uint32_t>(*reinterpret_cast<const float*>(t.step));
  const Philox bits =
      philox(static_cast<uint32_t>(i / 8), static_cast<uint32_t>((i / 8) >> 32),
             static_cast<uint32_t>(tensor), step, static_cast<uint64_t>(*a.rounding_seed));
  const int first = kPack == 8 ? 0 : static_cast<int>(i % 8);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    if (!(fabsf(x[k]) <= FLT_MAX)) continue;  // infinite, or no number
    uint32_t raw;
    memcpy(&raw, &x[k], sizeof raw);
    raw = (raw + bits_of(bits, first + k)) & 0xffff0000u;
    memcpy(&x[k], &raw, sizeof raw);
  }
}

__device__ __forceinline__ Scalars scalars_of(const Group& h, double lr, double step) {
  // In fp64, as 1 - beta^t would cancel in fp32.
  const double power1 = exp(step * h.log_beta1), power2 = exp(step * h.log_beta2);
  return {static_cast<float>(h.sign),
          static_cast<float>(1 - h.beta1),
          static_cast<float>(h.beta2),
          static_cast<float>(1 - h.beta2),
          static_cast<float>(lr * h.weight_decay),
          static_cast<float>(lr / (1 - power1)),
          static_cast<float>(1 / sqrt(1 - power2)),
          static_cast<float>(h.eps)};
}

// partial: a sum of squares for each block, or null where nothing is clipped. The 1 lets ptxas keep in
// registers what lives across the calls for fp64 divisions.
__global__ void __launch_bounds__(kThreads, 1)
    adamw_prepare_kernel(const Step a, float* __restrict__ partial, Scalars* __restrict__ scalars) {
  const int64_t all_threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n_tensors;
       i += all_threads) {
    const Tensor& t = a.tensors[i];
    auto* const count = reinterpret_cast<float*>(t.step);
    const float step = *count + (a.skipped() ? 0.0f : 1.0f);
    *count = step;
    const Group& group = a.groups[t.group];
    const double lr = t.lr ? *reinterpret_cast<const float*>(t.lr) : group.lr;
    scalars[i] = scalars_of(group, lr, step);
  }
  if (!partial) return;
  float squares[1] = {};
  for (int64_t i = blockIdx.x; i < a.n_chunks; i += gridDim.x) {
    const Tensor t = a.tensors[a.chunks[i].tensor];
    for_each_pack(t, a.chunks[i].number, a.chunk, [&](int64_t at, auto width) {
      float g[width];
      load_coded(t.g, t.g_code, at, g);
#pragma unroll
      for (int k = 0; k < width; ++k) squares[0] += g[k] * g[k];
    });
  }
  row_reduce<Sum>(squares);
  if (threadIdx.x == 0) partial[blockIdx.x] = squares[0];
}

// The norm of all gradients, unscaled; every thread of the block gets it.
__device__ __forceinline__ float norm_of(const float* partial, int64_t programs, float inverse) {
  float total[1] = {};
  for (int64_t i = threadIdx.x; i < programs; i += kThreads) total[0] += partial[i];
  row_reduce<Sum>(total);
  return sqrtf(total[0]) * inverse;
}

__global__ void __launch_bounds__(kThreads)
    adamw_update_kernel(const Step a, const float* __restrict__ partial, int64_t programs,
                        float max_norm, const Scalars* __restrict__ scalars,
                        float* __restrict__ norm) {
  float factor = a.grad_scale ? 1.0f / *a.grad_scale : 1.0f;
  if (partial) {
    const float size = norm_of(partial, programs, factor);
    if (blockIdx.x == 0 && threadIdx.x == 0) *norm = size;
    const float clip = max_norm / (size + kClipEps);
    factor *= clip > 1.0f ? 1.0f : clip;  // and not a minimum, which may drop a NaN
  }
  if (blockIdx.x >= a.n_chunks || a.skipped()) return;
  const Chunk chunk = a.chunks[blockIdx.x];
  const Tensor t = a.tensors[chunk.tensor];
  const Scalars s = scalars[chunk.tensor];
  factor *= s.sign;
  auto *const means = reinterpret_cast<float*>(t.m), *const squares = reinterpret_cast<float*>(t.v);
  auto* const master = reinterpret_cast<float*>(t.master);
  for_each_pack(t, chunk.number, a.chunk, [&](int64_t i, auto width) {
    float g[width], w[width];
    load_coded(t.g, t.g_code, i, g);
    auto m = load<width>(means + i);
    auto v = load<width>(squares + i);
    load_coded(master ? t.master : t.p, master ? 0 : t.p_code, i, w);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float grad = g[k] * factor;
      const float mean = m[k] + s.one_minus_beta1 * (grad - m[k]);
      const float square = s.beta2 * v[k] + s.one_minus_beta2 * grad * grad;
      const float root = sqrtf(square) * s.inverse_root + s.eps;
      w[k] = w[k] - s.decay * w[k] - s.size * mean / root;
      m.set(k, mean);
      v.set(k, square);
    }
    store(means + i, m);
    store(squares + i, v);
    if (master)
      store_as<float>(t.master, i, w);
    else if (a.rounding_seed && static_cast<DType>(t.p_code) == DType::BF16)
      round_at_random(a, chunk.tensor, t, i, w);
    store_coded(t.p, t.p_code, i, w);
  });
}

}  // namespace

void adamw(const int64_t* tensors, const int64_t* chunks, const double* hyper, int64_t n_tensors,
           int64_t n_chunks, int64_t chunk, double max_norm, const float* grad_scale,
           const float* found_inf, const int64_t* rounding_seed, float* norm, float* partial,
           int64_t programs, float* scalars, cudaStream_t stream) {
  const Step step{reinterpret_cast<const Tensor*>(tensors),
                  reinterpret_cast<const Chunk*>(chunks),
                  reinterpret_cast<const Group*>(hyper),
                  n_tensors,
                  n_chunks,
                  chunk,
                  grad_scale,
                  found_inf,
                  rounding_seed};
  auto* const of_tensors = reinterpret_cast<Scalars*>(scalars);
  const bool clips = max_norm >= 0;
  const int64_t blocks = clips ? programs : ceil_div(n_tensors, int64_t{kThreads});
  LAUNCH(adamw_prepare_kernel, grid_of(blocks), kThreads, 0, stream, step,
         clips ? partial : nullptr, of_tensors);
  LAUNCH(adamw_update_kernel, grid_of(n_chunks < 1 ? 1 : n_chunks), kThreads, 0, stream, step,
         clips ? partial : nullptr, programs, static_cast<float>(max_norm), of_tensors, norm);
}

}  // namespace gptfast::cuda
