// Products of bf16 matrices on the tile unit (AMX), for buffers that sit in the first- and
// second-level cache: C (M x N, fp32) = or += A (M x K) B (K x N).
//
// A tile register holds 16 rows of 64 bytes. The unit multiplies 16 x 32 numbers of A, as they lie
// in memory, with 32 x 16 of B, in which two rows lie interleaved: a 32-bit word holds the elements
// (2i, j) and (2i + 1, j). `pack_rows` and its transpose make the first form, `pack_pairs` and
// its transpose the second. M and N count in steps of 16 and K in steps of 32: what is packed is
// padded to that with zeros.
//
// Products are exact, sums are fp32. The unit takes subnormal numbers as zeros.
#pragma once
#ifdef __AMX_BF16__
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {
namespace amx {

constexpr int64_t kRows = 16;   // of a tile; also its columns of 32-bit numbers
constexpr int64_t kDepth = 32;  // numbers of K in a tile

// While it lives, this thread's tile registers hold 16 full rows each. Others in the process use
// the tiles too (PyTorch's oneDNN), so each task configures them for itself.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc 12 does not see that the instruction reads memory, and drops the stores.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// ROWS x COLUMNS tiles of C stay in registers 0 to 3 while K runs. Strides count elements: of A
// bf16, of B pairs, of C fp32.
template <int ROWS, int COLUMNS>
inline void multiply_tiles(int64_t K, const bf16* A, int64_t stride_a, const uint32_t* B,
                           int64_t stride_b, float* C, int64_t stride_c, bool accumulate) {
  const int64_t row_a = stride_a * 2, row_b = stride_b * 4, row_c = stride_c * 4;
  float *C_right = C + kRows, *C_below = C + kRows * stride_c, *C_last = C_below + kRows;
  if (accumulate) {
    _tile_loadd(0, C, row_c);
    if constexpr (COLUMNS == 2) _tile_loadd(1, C_right, row_c);
    if constexpr (ROWS == 2) _tile_loadd(2, C_below, row_c);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, C_last, row_c);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS == 2) _tile_zero(1);
    if constexpr (ROWS == 2) _tile_zero(2);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kDepth) {
    const bf16* a = A + k;
    const uint32_t* b = B + k / 2 * stride_b;
    _tile_loadd(4, a, row_a);
    _tile_loadd(6, b, row_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS == 2) {
      _tile_loadd(7, b + kRows, row_b);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS == 2) {
      _tile_loadd(5, a + kRows * stride_a, row_a);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, row_c);
  if constexpr (COLUMNS == 2) _tile_stored(1, C_right, row_c);
  if constexpr (ROWS == 2) _tile_stored(2, C_below, row_c);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_stored(3, C_last, row_c);
}

// A: M x K. B: K / 2 rows of N pairs. Sizes that are no multiples of a tile are taken as the next
// multiple. `Tiles` must be alive.
inline void multiply(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t stride_a,
                     const uint32_t* B, int64_t stride_b, float* C, int64_t stride_c,
                     bool accumulate) {
  asm volatile("" ::: "memory");  // the tile loads of gcc 12 do not say that they read memory
  for (int64_t n = 0; n < N; n += 2 * kRows)
    for (int64_t m = 0; m < M; m += 2 * kRows) {
      const bool two_rows = m + kRows < M, two_columns = n + kRows < N;
      const bf16* a = A + m * stride_a;
      float* c = C + m * stride_c + n;
      if (two_rows && two_columns)
        multiply_tiles<2, 2>(K, a, stride_a, B + n, stride_b, c, stride_c, accumulate);
      else if (two_rows)
        multiply_tiles<2, 1>(K, a, stride_a, B + n, stride_b, c, stride_c, accumulate);
      else if (two_columns)
        multiply_tiles<1, 2>(K, a, stride_a, B + n, stride_b, c, stride_c, accumulate);
      else
        multiply_tiles<1, 1>(K, a, stride_a, B + n, stride_b, c, stride_c, accumulate);
    }
}

// ---- Packing -------------------------------------------------------------------------------------

// The first form: `rows` x D, padded with zeros to `padded_rows` rows of `width`, a multiple of 32.
inline void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t D, int64_t padded_rows,
                      int64_t width, bf16* out) {
  const int64_t tail = D % kDepth;
  const __mmask32 live = (__mmask32{1} << tail) - 1;
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* from = x + r * stride;
    bf16* to = out + r * width;
    for (int64_t d = 0; d < D - tail; d += kDepth)
      _mm512_storeu_si512(to + d, _mm512_loadu_si512(from + d));
    if (tail) _mm512_storeu_si512(to + D - tail, _mm512_maskz_loadu_epi16(live, from + D - tail));
  }
  std::memset(out + rows * width, 0, (padded_rows - rows) * width * sizeof(bf16));
}

// The second form, from the first: rows 2i and 2i + 1 interleaved, for even `rows`.
inline void pack_pairs(const bf16* x, int64_t width, int64_t rows, uint32_t* out) {
  auto widen = [](const bf16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t d = 0; d < width; d += 16) {
      const __m512i even = widen(x + r * width + d), odd = widen(x + (r + 1) * width + d);
      _mm512_storeu_si512(out + r / 2 * width + d,
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

// Numbers of two rows, rounded, as 16 pairs of the second form.
GPTFAST_INLINE void store_pairs(uint32_t* out, f32v even, f32v odd) {
  alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kZip), both));
}

// Two rows of 32 fp32 numbers, rounded: as rows of the first form, and, if wanted, as 32 pairs of the
// second.
template <bool PAIRS>
inline void round_two_rows(const f32v (&x)[2][2], bf16* rows, int64_t width, uint32_t* pairs) {
  for (int i = 0; i < 2; ++i)
    _mm512_storeu_si512(rows + i * width, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(x[i][1], x[i][0])));
  if constexpr (PAIRS)
    for (int j = 0; j < 2; ++j) store_pairs(pairs + 16 * j, x[0][j], x[1][j]);
}

// fp32 rows of `stride`, rounded: rows x columns numbers, padded with zeros to multiples of 32 rows
// and columns. As the first form, with rows of `width`, and, if wanted, as the second, with rows of
// `width` pairs.
template <bool PAIRS>
inline void round_tile(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width,
                       bf16* out, uint32_t* pairs) {
  const int64_t padded = (rows + kDepth - 1) / kDepth * kDepth;
  for (int64_t r = 0; r < padded; r += 2)
    for (int64_t c = 0; c < columns; c += kDepth) {
      f32v part[2][2];
      if (r + 2 <= rows && c + kDepth <= columns)
        for (int i = 0; i < 4; ++i)
          part[i / 2][i % 2] = load(x + (r + i / 2) * stride + c + i % 2 * 16);
      else
        for (int i = 0; i < 4; ++i) {
          const int64_t row = r + i / 2, column = c + i % 2 * 16;
          const int64_t n = row < rows && column < columns ? columns - column : 0;
          part[i / 2][i % 2] = load_n(x + row * stride + column, n < 16 ? n : 16);
        }
      round_two_rows<PAIRS>(part, out + r * width + c, width, pairs + r / 2 * width + c);
    }
}

}  // namespace amx
}  // namespace
}  // namespace gptfast::GPTFAST_ISA
#endif
