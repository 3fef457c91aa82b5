// What the CPU and the CUDA kernel of sampling share: the integer arithmetic by which both draw the
// same token. The maths stands in gptfast/ops/sample.py.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GPTFAST_SHARED static __host__ __device__ __forceinline__
#else
#define GPTFAST_SHARED static inline
#endif

namespace gptfast {

// What Python has made of temperature, top_k, top_p and min_p.
struct SamplingRule {
  float penalty;        // of tokens that were there before
  float steps;          // what a distance between logits is multiplied with: n; 0 for greedy
  int64_t top_k;        // 1 to V
  int64_t share;        // top_p, in units of 2^-31
  uint64_t min_weight;  // min_p, in units of the largest weight
};

// Whole numbers in the order of the floats, 0 and -0 being equal; NaN comes above all.
GPTFAST_SHARED uint32_t rank_key(float z) {
  uint32_t bits;
  memcpy(&bits, &z, sizeof bits);
  if (z != z) return 0xffffffffu;
  if (z == 0.0f) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
GPTFAST_SHARED float float_of_key(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float z;
  memcpy(&z, &bits, sizeof z);
  return z;
}
constexpr uint32_t kKeyOfInfinity = 0xff800000u, kKeyOfMinusInfinity = 0x007fffffu;

// The weight: 2^40 2^(-n / 2^24), n = distance * steps, rounded down. A polynomial in -f stands for
// 2^31 2^-f in [0, 1); it never increases with f, and is right to 2^-27. Only a
// subtraction comes before the product distance * steps and a conversion behind it: no compiler can
// fuse them into something that rounds otherwise.
constexpr uint32_t kPower6 = 0x0003928eu, kPower5 = 0x0029c55du, kPower4 = 0x0139e3fcu;
constexpr uint32_t kPower3 = 0x071a5235u, kPower2 = 0x1ebfac0eu, kPower1 = 0x58b90b02u;
constexpr uint32_t kPower0 = 0x80000000u;
constexpr float kFarthest = 2147483520.0f;  // the last float below 2^31: a weight of 0

GPTFAST_SHARED uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

GPTFAST_SHARED uint64_t token_weight(float distance, float steps) {
  const float product = distance * steps;
  const int32_t n = static_cast<int32_t>(product < kFarthest ? product : kFarthest);
  const uint32_t f = static_cast<uint32_t>(n) << 8;
  uint32_t p = kPower5 - multiply_high(f, kPower6);
  p = kPower4 - multiply_high(f, p);
  p = kPower3 - multiply_high(f, p);
  p = kPower2 - multiply_high(f, p);
  p = kPower1 - multiply_high(f, p);
  p = kPower0 - multiply_high(f, p);
  const int32_t whole = n >> 24;
  return (uint64_t{p} << 9) >> (whole < 63 ? whole : 63);
}

constexpr uint64_t kLow31 = 0x7fffffffu;

// share 2^-31 of a total, rounded up.
GPTFAST_SHARED uint64_t share_of(uint64_t total, int64_t share) {
  const uint64_t part = static_cast<uint64_t>(share);
  return part * (total >> 31) + ((part * (total & kLow31) + kLow31) >> 31);
}

// total u 2^-62, rounded down, where u is 62 bits.
GPTFAST_SHARED uint64_t place_in(uint64_t total, uint32_t word0, uint32_t word1) {
  const uint64_t high = total >> 31, low = total & kLow31, u1 = word0 >> 1, u0 = word1 >> 1;
  return high * u1 + ((high * u0 + low * u1 + ((low * u0) >> 31)) >> 31);
}

}  // namespace gptfast
