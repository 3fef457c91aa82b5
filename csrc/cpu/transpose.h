// Transposes of 32-bit words: floats, or pairs of 16-bit numbers.
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

// W x W words: rows of `in` become columns of `out`. Strides count words.
template <class Word>
inline void transpose_block(const Word* in, int64_t stride_in, Word* out, int64_t stride_out) {
  static_assert(sizeof(Word) == 4);
#if GPTFAST_VECTOR_BYTES == 64
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(in + i * stride_in);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // Lane l of x[4 g + c] now holds rows 4 g to 4 g + 3 of column 4 l + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    auto put = [&](int column, __m512i v) { _mm512_storeu_si512(out + column * stride_out, v); };
    put(c, _mm512_shuffle_i32x4(even01, even23, 0x88));
    put(4 + c, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    put(8 + c, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    put(12 + c, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) out[j * stride_out + i] = in[i * stride_in + j];
#endif
}

// rows x columns words, both multiples of W
template <class Word>
inline void transpose(const Word* in, int64_t stride_in, int64_t rows, int64_t columns, Word* out,
                      int64_t stride_out) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W)
      transpose_block(in + i * stride_in + j, stride_in, out + j * stride_out + i, stride_out);
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
