// Philox-4x32-10 (Salmon et al., SC 2011), a counter-based random generator: W counters at once.
// The same counter and key give the same bits on every backend, so a dropout mask is never stored.
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

struct Philox {
  u32v word[4];
};

// low and high halves of the 32 x 32 bit product, lane by lane
GPTFAST_INLINE void multiply_wide(u32v a, uint32_t b, u32v* high, u32v* low) {
  typedef uint64_t u64v __attribute__((vector_size(W * 4)));
  const u64v factor = b - u64v{};
  const u64v even_mask = 0xffffffffull - u64v{};
  const u64v lanes = bit_cast<u64v>(a);
#if GPTFAST_VECTOR_BYTES == 64
  const u64v even = (u64v)_mm512_mul_epu32((__m512i)lanes, (__m512i)factor);
  const u64v odd = (u64v)_mm512_mul_epu32((__m512i)(lanes >> 32), (__m512i)factor);
#elif GPTFAST_VECTOR_BYTES == 32
  const u64v even = (u64v)_mm256_mul_epu32((__m256i)lanes, (__m256i)factor);
  const u64v odd = (u64v)_mm256_mul_epu32((__m256i)(lanes >> 32), (__m256i)factor);
#else
  const u64v even = (lanes & even_mask) * factor;
  const u64v odd = (lanes >> 32) * factor;
#endif
  *low = bit_cast<u32v>((even & even_mask) | (odd << 32));
  *high = bit_cast<u32v>((even >> 32) | (odd & ~even_mask));
}

GPTFAST_INLINE Philox philox(u32v c0, u32v c1, u32v c2, u32v c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    u32v high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
