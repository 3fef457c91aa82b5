// Attention of 16 queries, held by one warp, to tiles of keys in shared memory:
//
//   s = log2(e) scale q k^T,   p = 2^(s - top),   o = sum p v / sum p,   lse = ln sum e^(ln 2 s)
//
// where top, the largest score so far, changes from tile to tile, and o and the sum with it.
//
// Products are mma.sync of 16 x 16 by 16 x 8 elements. With g = lane / 4 and t = lane % 4, a lane
// holds of a 16 x 8 tile of s or o the columns 2 t and 2 t + 1 of rows g and g + 8: [0] and [1] are
// of row g, [2] and [3] of row g + 8. These are the places where mma.sync expects p as its operand.
#pragma once
#include "common.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace gptfast::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Elements from row to row of a tile in shared memory. 16 bytes more than a row has: then eight rows,
// which ldmatrix reads at a time, lie in different banks.
template <int kD>
constexpr int kPitch = kD + 8;

// Calls body with the columns of a tile as a constant, which hold D and Dv columns.
template <class Body>
void with_head_dim(int64_t D, int64_t Dv, const Body& body) {
  const int64_t widest = D > Dv ? D : Dv;
  if (widest <= 64) return body(std::integral_constant<int, 64>{});
  if (widest <= 96) return body(std::integral_constant<int, 96>{});
  if (widest <= 128) return body(std::integral_constant<int, 128>{});
  if (widest <= 256) return body(std::integral_constant<int, 256>{});
  throw std::runtime_error("CUDA attention: head dims must be at most 256, got " +
                           std::to_string(widest));
}

// Calls body with a value of the storage type that `dtype` names: those that mma.sync multiplies.
template <class Body>
void with_half_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::BF16: return body(__nv_bfloat16{});
    case DType::F16: return body(__half{});
    default: throw std::runtime_error("CUDA attention: dtype must be bfloat16 or float16");
  }
}

// Throws unless 16 bytes divide the address and the strides of x, whose elements have 2.
inline void check_aligned(const char* name, const Heads& x) {
  if (!aligned_16(x.data) || (x.stride_b | x.stride_h | x.stride_t) % 8)
    throw std::runtime_error(std::string("CUDA attention: address and strides of ") + name +
                             " must be multiples of 16 bytes");
}

// Throws unless the head dims are whole packs of 16 bytes, and sums of the tokens' indices are no more
// than 32 bits hold.
inline void check_sizes(int64_t tokens, int64_t D, int64_t Dv) {
  if (tokens >= int64_t{1} << 30 || D % 8 || Dv % 8)
    throw std::runtime_error(
        "CUDA attention: needs fewer than 2^30 tokens, and head dims that are multiples of 8");
}

// A limit of a window; -1, or more keys than there are tokens, is none.
inline int limit(int64_t keys, int64_t tokens) {
  return static_cast<int>(keys < 0 || keys > tokens ? tokens : keys);
}

template <class T>
__device__ __forceinline__ T* row_of(const Heads& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + t * x.stride_t;
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float a, float b) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

template <class T, int kD>
class AttentionTile {
  // Wider queries would fill the registers that o needs: every product reads them again.
  static constexpr bool kKeepsQueries = kD <= 128;
  uint32_t q_[kKeepsQueries ? kD / 16 : 1][4];
  const T* q_tile_;  // where this lane reads

 public:
  float o[kD / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY};  // of rows g and g + 8
  float total[2] = {};                    // of p in this lane's columns

  // tile: 16 rows in shared memory, kPitch<kD> apart, as all tiles here.
  __device__ __forceinline__ explicit AttentionTile(const T* tile) {
    const int lane = threadIdx.x % 32;
    q_tile_ = tile + lane % 16 * kPitch<kD> + lane / 16 * 8;
    if constexpr (kKeepsQueries)
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) ldmatrix_4<false>(q_[step], q_tile_ + 16 * step);
  }

  // s = q k^T
  template <int kKeys>
  __device__ __forceinline__ void scores(const T* tile, float (&s)[kKeys / 8][4]) {
    const int lane = threadIdx.x % 32;
    tile += (lane / 16 * 8 + lane % 8) * kPitch<kD> + lane / 8 % 2 * 8;
#pragma unroll
    for (auto& part : s) part[0] = part[1] = part[2] = part[3] = 0.0f;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      auto& q = q_[kKeepsQueries ? step : 0];
      if constexpr (!kKeepsQueries) ldmatrix_4<false>(q, q_tile_ + 16 * step);
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        uint32_t k[4];
        ldmatrix_4<false>(k, tile + 16 * pair * kPitch<kD> + 16 * step);
        mma_16x8x16<T>(s[2 * pair], q, k[0], k[1]);
        mma_16x8x16<T>(s[2 * pair + 1], q, k[2], k[3]);
      }
    }
  }

  // s becomes p; -inf is a key that the row does not see.
  template <int kParts>
  __device__ __forceinline__ void softmax(float (&s)[kParts][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_top = top[half];
#pragma unroll
      for (const auto& part : s)
        new_top = fmaxf(new_top, fmaxf(part[2 * half], part[2 * half + 1]));
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 2));
      // A row that has seen no key yet: 2^(-inf - 0) = 0 instead of NaN.
      const float base = new_top == -INFINITY ? 0.0f : new_top;
      const float factor = exp2_approx(top[half] - base);
      top[half] = new_top;
      total[half] *= factor;
#pragma unroll
      for (auto& part : s)
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          part[j] = exp2_approx(part[j] - base);
          total[half] += part[j];
        }
#pragma unroll
      for (auto& part : o) {
        part[2 * half] *= factor;
        part[2 * half + 1] *= factor;
      }
    }
  }

  // o += p v
  template <int kParts>
  __device__ __forceinline__ void add_values(const float (&p)[kParts][4], const T* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane % 16 * kPitch<kD> + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kParts / 2; ++step) {
      const auto &left = p[2 * step], &right = p[2 * step + 1];
      const uint32_t a[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
                             pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])};
#pragma unroll
      for (int pair = 0; pair < kD / 16; ++pair) {
        uint32_t v[4];
        ldmatrix_4<true>(v, tile + 16 * step * kPitch<kD> + 16 * pair);
        mma_16x8x16<T>(o[2 * pair], a, v[0], v[1]);
        mma_16x8x16<T>(o[2 * pair + 1], a, v[2], v[3]);
      }
    }
  }

  // Behind the last tile: total becomes that of the whole row.
  __device__ __forceinline__ void sum_totals() {
#pragma unroll
    for (float& sum : total) {
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
    }
  }
};

}  // namespace gptfast::cuda
