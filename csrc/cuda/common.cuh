// What kernels share: storage types, 128-bit accesses, sums over a warp and over a row's threads.
#pragma once
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../common/dtype.h"
#include "ptx.cuh"

namespace gptfast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// A grid of one dimension.
inline unsigned grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("CUDA: a launch needs more than 2^31 - 1 blocks: too many rows");
  return static_cast<unsigned>(blocks);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::F32: return body(float{});
    case DType::BF16: return body(__nv_bfloat16{});
    case DType::F16: return body(__half{});
  }
}

// Calls body with values of the storage types of a branch and of the stream that it joins, which has
// the branch's or is fp32.
template <class Body>
void with_stream_dtype(DType branch, DType stream, const Body& body) {
  with_dtype(branch, [&](auto t) {
    if (stream == branch)
      body(t, t);
    else
      body(t, float{});
  });
}

// ---- 128-bit accesses -----------------------------------------------------------------------------

// kWidth neighbours of T, loaded and stored in one instruction where they fill 16 bytes, in several
// where they are more.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T value[kWidth];

  __device__ __forceinline__ float operator[](int i) const { return to_float(value[i]); }
  __device__ __forceinline__ void set(int i, float x) { value[i] = from_float<T>(x); }
};

template <class T>
constexpr int kFullWidth = 16 / sizeof(T);

template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}
template <class T, int kWidth>
__device__ __forceinline__ void store(T* to, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// The same to global memory that the kernel does not read again, and certainly in accesses of 16 bytes.
template <class T, int kWidth>
__device__ __forceinline__ void store_result(T* to, const Pack<T, kWidth>& pack) {
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 raw[sizeof(pack) / 16];
    memcpy(raw, &pack, sizeof pack);
#pragma unroll
    for (unsigned i = 0; i < sizeof(pack) / 16; ++i)
      store_global_16(reinterpret_cast<uint4*>(to) + i, raw[i]);
  } else {
    store(to, pack);
  }
}

// The first `count` of kWidth neighbours, and zeros: in one instruction where `whole`, which says that
// these are all and aligned, and otherwise element by element.
template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> load_some(const T* from, bool whole, int64_t count) {
  if (whole) return load<kWidth>(from);
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.value[i] = i < count ? from[i] : from_float<T>(0.0f);
  return pack;
}
template <class T, int kWidth>
__device__ __forceinline__ void store_some(T* to, const Pack<T, kWidth>& pack, bool whole,
                                           int64_t count) {
  if (whole) return store_result(to, pack);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) to[i] = pack.value[i];
}

// kWidth neighbours from any address, and to any.
template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> load_any(const T* from) {
  Pack<T, kWidth> pack;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(pack) == 0) return load<kWidth>(from);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.value[i] = from[i];
  return pack;
}

template <class T, int kWidth>
__device__ __forceinline__ void store_any(T* to, const Pack<T, kWidth>& pack) {
  store_some(to, pack, reinterpret_cast<uintptr_t>(to) % sizeof(pack) == 0, kWidth);
}

// Whether all these pointers (null ones, too) are aligned to 16 bytes.
template <class... Pointers>
bool aligned_16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Calls body with the width of packs as a constant: full where rows of N elements stay aligned.
template <class T, class Body>
void with_width(bool aligned, int64_t N, const Body& body) {
  if (aligned && N % kFullWidth<T> == 0)
    body(std::integral_constant<int, kFullWidth<T>>{});
  else
    body(std::integral_constant<int, 1>{});
}

// A vector of parameters (a weight, a bias), which may have another dtype than the rows it meets.
struct Parameter {
  const void* data;  // null: absent
  DType dtype;

  __device__ __forceinline__ float at(int64_t column) const {
    switch (dtype) {
      case DType::F32: return static_cast<const float*>(data)[column];
      case DType::BF16: return to_float(static_cast<const __nv_bfloat16*>(data)[column]);
      default: return to_float(static_cast<const __half*>(data)[column]);
    }
  }

  // kWidth columns, or `absent` for each where there is no vector.
  template <int kWidth>
  __device__ __forceinline__ void load(int64_t column, float (&out)[kWidth], float absent) const {
    if (!data) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] = absent;
      return;
    }
    switch (dtype) {
      case DType::F32: return load_as<kWidth, float>(column, out);
      case DType::BF16: return load_as<kWidth, __nv_bfloat16>(column, out);
      default: return load_as<kWidth, __half>(column, out);
    }
  }

 private:
  template <int kWidth, class T>
  __device__ __forceinline__ void load_as(int64_t column, float (&out)[kWidth]) const {
    constexpr int kStep = kWidth < kFullWidth<T> ? kWidth : kFullWidth<T>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kStep) {
      const auto pack = cuda::load<kStep>(static_cast<const T*>(data) + column + i);
#pragma unroll
      for (int k = 0; k < kStep; ++k) out[i + k] = pack[k];
    }
  }
};

// ---- Reductions -------------------------------------------------------------------------------------

struct Sum {
  static constexpr float kNeutral = 0.0f;
  __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float kNeutral = -FLT_MAX;
  __device__ __forceinline__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op, int kValues>
__device__ __forceinline__ void warp_reduce(float (&v)[kValues]) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = Op::of(v[i], __shfl_xor_sync(kAllLanes, v[i], bits));
}

// Reduces over the blockDim.x threads of a row, all of which get the result. A row of one warp needs
// no barrier; a wider one has the block to itself. Every thread of the block must come here.
template <class Op, int kValues>
__device__ __forceinline__ void row_reduce(float (&v)[kValues]) {
  warp_reduce<Op>(v);
  if (blockDim.x == 32) return;
  __shared__ float of_warp[kValues][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // what the call before left here has been read
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < kValues; ++i) of_warp[i][warp] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    v[i] = lane * 32 < static_cast<int>(blockDim.x) ? of_warp[i][lane] : Op::kNeutral;
  warp_reduce<Op>(v);
}

}  // namespace gptfast::cuda
