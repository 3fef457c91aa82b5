// Products of two bf16 matrices on the tile unit (AMX), for kernels that consume what they make:
// packing into units, the product of one block of 32 x 32 numbers with work done meanwhile, and how
// work is shared out. linear_cross_entropy.cpp and linear_gelu.cpp are made of these.
#pragma once
#include <cstring>

#include "amx.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

#ifdef __AMX_BF16__
namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kPanel = 32;              // rows or columns of a product, two tiles
constexpr int64_t kUnit = kPanel * kPanel;  // numbers that a panel has for a step of K
// That a sum over tokens takes at a time: 768 KiB of x where C is 768, in a second-level cache of 2 MB.
constexpr int64_t kTokenPanels = 16;

inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

// ---- Packing -------------------------------------------------------------------------------------
// A unit is a 32 x 32 block of a matrix in one of four forms, each two tiles: operand A or B of a
// product, with the block's columns or its rows along K.

struct Unit {
  alignas(64) bf16 numbers[kUnit];
};

// The block at x, zero where rows or columns end.
inline void read_block(const bf16* x, int64_t stride, int64_t rows, int64_t columns, Unit& block) {
  const __mmask32 live =
      columns >= kPanel ? ~__mmask32{0} : (__mmask32{1} << (columns > 0 ? columns : 0)) - 1;
  for (int64_t r = 0; r < kPanel; ++r) {
    const __m512i row = r < rows ? _mm512_maskz_loadu_epi16(live, x + r * stride) : __m512i{};
    _mm512_store_si512(block.numbers + r * kPanel, row);
  }
}

inline uint32_t* words(bf16* numbers) { return reinterpret_cast<uint32_t*>(numbers); }
inline const uint32_t* words(const bf16* numbers) {
  return reinterpret_cast<const uint32_t*>(numbers);
}

// B, columns along K: a tile for 16 of the rows.
inline void pack_b_from_rows(const Unit& block, bf16* out) {
  for (int64_t tile = 0; tile < kUnit; tile += kUnit / 2)
    transpose_block(words(block.numbers + tile), 16, words(out + tile), 16);
}

inline __m512i zip_indices(int64_t first) {  // of a's and b's 16 numbers from the first on, in turn
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(first + i / 2 + i % 2 * 32);
  return _mm512_load_si512(index);
}

// B, rows along K: a tile for 16 of the columns.
inline void pack_b_from_columns(const Unit& block, bf16* out) {
  const __m512i left = zip_indices(0), right = zip_indices(16);
  for (int64_t r = 0; r < kPanel; r += 2) {
    const __m512i even = _mm512_load_si512(block.numbers + r * kPanel);
    const __m512i odd = _mm512_load_si512(block.numbers + (r + 1) * kPanel);
    bf16* row = out + r / 2 * kPanel;
    _mm512_store_si512(row, _mm512_permutex2var_epi16(even, left, odd));
    _mm512_store_si512(row + kUnit / 2, _mm512_permutex2var_epi16(even, right, odd));
  }
}

// A, rows along K: a tile for 16 of the columns. (A with columns along K is the block itself.)
inline void pack_a_from_columns(const Unit& block, bf16* out) {
  Unit zipped;
  pack_b_from_columns(block, zipped.numbers);
  pack_b_from_rows(zipped, out);
}

// ---- The product ---------------------------------------------------------------------------------

// Something to do meanwhile, in 16 steps.
struct NoWork {
  static constexpr int steps = 0;
  void step() {}
};

// Meanwhile, brings memory that is needed soon into the second-level cache, bit by bit.
class ReadAhead {
 public:
  void begin(const void* memory, int64_t bytes, int64_t steps) {
    at_ = static_cast<const char*>(memory);
    end_ = at_ + bytes;
    stride_ = (bytes / steps + 63) / 64 * 64;
  }
  void step() {
    if (at_ >= end_) return;
    for (int64_t i = 0; i < stride_; i += 64) _mm_prefetch(at_ + i, _MM_HINT_T1);
    at_ += stride_;
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_ = 0;
};

// C (32 x 32, rows of 32) = or += A B over `units` steps of K; runs `work` to its end.
template <class Work>
inline void multiply(const bf16* A, const bf16* B, int64_t units, float* C, bool accumulate,
                     bool backwards, Work& work, ReadAhead& ahead) {
  constexpr int64_t kRow = kPanel * sizeof(float), kTileRow = 64, kTile = kUnit / 2;
  asm volatile("" ::: "memory");  // the tile loads of gcc 12 do not say that they read memory
  if (accumulate) {
    _tile_loadd(0, C, kRow);
    _tile_loadd(1, C + 16, kRow);
    _tile_loadd(2, C + 16 * kPanel, kRow);
    _tile_loadd(3, C + 16 * kPanel + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t next = backwards ? -kUnit : kUnit;
  if (backwards) {
    A += (units - 1) * kUnit;
    B += (units - 1) * kUnit;
  }
  for (int64_t k = 0; k < units; ++k, A += next, B += next) {
    _tile_loadd(4, A, kTileRow);
    _tile_loadd(6, B, kTileRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + kTile, kTileRow);
    _tile_dpbf16ps(1, 4, 7);
    ahead.step();
    if (work.steps) work.step();
    _tile_loadd(5, A + kTile, kTileRow);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, kRow);
  _tile_stored(1, C + 16, kRow);
  _tile_stored(2, C + 16 * kPanel, kRow);
  _tile_stored(3, C + 16 * kPanel + 16, kRow);
  asm volatile("" ::: "memory");
  while (work.steps) work.step();
}

// ---- Sharing out --------------------------------------------------------------------------------

// Hands out pieces of a workspace; from null, only counts them.
class Arena {
 public:
  explicit Arena(void* start) : start_(start) {
    if (start) used_ = -reinterpret_cast<intptr_t>(start) & 63;
  }
  template <class T>
  T* take(int64_t n) {
    T* piece = start_ ? reinterpret_cast<T*>(static_cast<char*>(start_) + used_) : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t bytes() const { return used_ + 64; }

 private:
  void* start_;
  int64_t used_ = 0;
};

// [0, n) in contiguous pieces, one for each thread of the team.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t n) {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
    begin = n * t / team;
    end = n * (t + 1) / team;
  }
  int64_t after(int64_t i) const { return i + 1 < end ? i + 1 : begin; }
};

// Operands with tokens along K are cut into chunks, which are summed one after the other:
// units[chunk][panel][token panel in chunk].
inline int64_t token_unit(int64_t panel, int64_t panels, int64_t token_panel) {
  const int64_t chunk = token_panel / kTokenPanels;
  return ((chunk * panels + panel) * kTokenPanels + token_panel % kTokenPanels) * kUnit;
}

// Two blocks of 32 x 32: one is computed while work is done on the other.
struct InTurns {
  alignas(64) float blocks[2][kUnit];
  int turn = 0;
  float* next() { return blocks[turn ^= 1]; }
};

template <class Work>
void drain(Work& work) {
  while (work.steps) work.step();
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
#endif
