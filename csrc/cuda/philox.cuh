// Philox-4x32-10 (Salmon et al., SC 2011), a counter-based random generator, and dropout masks drawn
// from it: gptfast/ops/philox.py says which bits belong to which element. Every backend draws the
// same.
#pragma once
#include "common.cuh"

namespace gptfast::cuda {

struct Philox {
  uint32_t word[4];
};

__device__ __forceinline__ Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                         uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which 16 of the 128 bits `lane`, 0 to 7, says. By choice: an index would send them through memory.
__device__ __forceinline__ uint32_t bits_of(const Philox& bits, int lane) {
  const uint32_t low = lane < 2 ? bits.word[0] : bits.word[1];
  const uint32_t high = lane < 6 ? bits.word[2] : bits.word[3];
  const uint32_t word = lane < 4 ? low : high;
  return lane % 2 ? word >> 16 : word & 0xffffu;
}

// Factors z of a matrix, 0 or 2^16 / threshold.
struct Dropout {
  const int64_t* seed;  // one number on the device; null: no dropout
  uint32_t threshold;   // an element is kept where its 16 bits are below
  float scale;          // 2^16 / threshold: a division in a kernel would spill registers

  Dropout(const int64_t* seed, int64_t threshold)
      : seed(seed),
        threshold(static_cast<uint32_t>(threshold)),
        scale(threshold ? 65536.0f / threshold : 0.0f) {}

  // Multiplies kWidth neighbours, the first of which stands in a column that kWidth divides.
  template <int kWidth>
  __device__ __forceinline__ void apply(int64_t row, int64_t column, float (&x)[kWidth]) const {
    static_assert(8 % kWidth == 0);
    if (!seed) return;
    const Philox bits = philox(static_cast<uint32_t>(row), static_cast<uint32_t>(column / 8), 0, 0,
                               static_cast<uint64_t>(*seed));
    const int first = kWidth == 8 ? 0 : static_cast<int>(column % 8);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      x[i] = bits_of(bits, first + i) < threshold ? x[i] * scale : 0.0f;
  }
};

}  // namespace gptfast::cuda
