// The two units that multiply the blocks of attention: fp32 vectors, and for bf16 the tiles of AMX.
//
// An operand is packed once and then used in up to two of four forms: X or its transpose, on the
// left or on the right side of a product. Both units have the same interface:
//   Operand::pack<forms>(x, stride, rows, D)        a block of at most 64 rows of q, k, v or do
//   Operand::pack_tile<forms>(tile, stride, keys, queries)  a score tile, made by the kernel in fp32
//   multiply(M, N, K, left, right, C, stride_c, accumulate)
// M and N may be rounded up to `width`, so buffers for C have room for that. Weights of a softmax
// become an operand on the right, keys by keys, while they are made:
//   Operand::begin_weights(tile, stride, keys), then put_weights(key, lane, of it, of the next key)
// for every second key; behind an odd number of keys, one more row is written. VectorUnit keeps them
// in the tile.
#pragma once
#include "amx.h"
#include "gemm_tile.h"
#include "parallel.h"
#include "transpose.h"

namespace gptfast::GPTFAST_ISA {
namespace {

// A score tile has up to kKeys keys and up to Unit::kQueries or Unit::kBackwardQueries queries.
constexpr int64_t kKeys = 64, kMostQueries = 64;

constexpr int kLeft = 1, kLeftTransposed = 2, kRight = 4, kRightTransposed = 8;

struct VectorUnit {
  // Queries of a score tile: four vectors of AVX-512.
  static constexpr int64_t kQueries = 64, kBackwardQueries = 64;
  static constexpr int64_t kTogether = 1, kSharing = 8;  // as of TileUnit
  struct Session {};

  static int64_t width(int64_t n) { return ceil_to(n, W); }

  using Left = Matrix;
  struct Right {
    const float* data;
    int64_t stride;
  };

  class Operand {
   public:
    template <int FORMS, class T>
    void pack(const T* x, int64_t stride, int64_t rows, int64_t D) {
      width_ = width(D);
      float* out = rows_.reserve(kMostQueries * width_);
      for (int64_t r = 0; r < rows; ++r)
        for_each_vector(D, [&](int64_t d, auto part) {
          store(out + r * width_ + d, part.load(x + r * stride + d));
        });
      data_ = out;
      if (FORMS & kRightTransposed) {
        const int64_t padded = ceil_to(rows, W);
        std::memset(out + rows * width_, 0, (padded - rows) * width_ * sizeof(float));
        transpose(out, width_, padded, width_, columns_.reserve(padded * width_), padded);
        transposed_ = columns_.reserve(padded * width_);
        transposed_stride_ = padded;
      }
    }
    template <int FORMS>
    void pack_tile(const float* tile, int64_t stride, int64_t, int64_t) {
      data_ = tile;
      width_ = stride;
    }
    void begin_weights(float* tile, int64_t stride, int64_t keys) {
      tile_ = tile;
      pack_tile<kRight>(tile, stride, keys, stride);
    }
    GPTFAST_INLINE void put_weights(int64_t key, int64_t lane, f32v even, f32v odd) {
      store(tile_ + key * width_ + lane, even);
      store(tile_ + (key + 1) * width_ + lane, odd);
    }
    Left left() const { return {data_, width_, 1}; }
    Left left_transposed() const { return {data_, 1, width_}; }
    Right right() const { return {data_, width_}; }
    Right right_transposed() const { return {transposed_, transposed_stride_}; }

   private:
    float* tile_;
    const float *data_, *transposed_;
    int64_t width_, transposed_stride_;
    Scratch rows_, columns_;
  };

  static void multiply(int64_t M, int64_t N, int64_t K, Left A, Right B, float* C, int64_t stride_c,
                       bool accumulate) {
    gemm(M, width(N), K, A, B.data, B.stride, C, stride_c, accumulate);
  }
};

#ifdef __AMX_BF16__
struct TileUnit {
  // Forward, the operands of both products of a block and what they make fit the first-level cache.
  // Backward, where they do not, 64 take an eighth less time than 32: dk and dv are loaded and
  // stored half as often.
  static constexpr int64_t kQueries = 32, kBackwardQueries = 64;
  // Blocks of queries whose products follow each other, without the softmax of each in between:
  // behind some 500 cycles of other arithmetic the tile unit loses as many to wake up. 4 to 16 were
  // equally fast, and 1 a fifth slower.
  static constexpr int64_t kTogether = 8;
  // Blocks of queries of a task, which share the packing of keys and values.
  static constexpr int64_t kSharing = 16;
  using Session = amx::Tiles;

  static int64_t width(int64_t n) { return ceil_to(n, amx::kDepth); }

  struct Left {
    const bf16* data;
    int64_t stride;
  };
  struct Right {
    const uint32_t* data;
    int64_t stride;
  };

  class Operand {
   public:
    template <int FORMS>
    void pack(const bf16* x, int64_t stride, int64_t rows, int64_t D) {
      const int64_t wide = width(D), padded = width(rows), words = wide / 2;
      bf16* out = rows_.reserve<bf16>(padded * wide);
      amx::pack_rows(x, stride, rows, D, padded, wide, out);
      if (FORMS & kLeft) left_ = {out, wide};
      if (FORMS & kRightTransposed) {
        uint32_t* columns = columns_.reserve<uint32_t>(padded * words);
        transpose(reinterpret_cast<const uint32_t*>(out), words, padded, words, columns, padded);
        right_transposed_ = {columns, padded};
      }
      if (FORMS & (kRight | kLeftTransposed)) {
        uint32_t* pairs = pairs_.reserve<uint32_t>(padded / 2 * wide);
        amx::pack_pairs(out, wide, padded, pairs);
        right_ = {pairs, wide};
        if (FORMS & kLeftTransposed) {
          bf16* columns = columns_.reserve<bf16>(padded * wide);
          transpose(pairs, wide, padded / 2, wide, reinterpret_cast<uint32_t*>(columns),
                    padded / 2);
          left_transposed_ = {columns, padded};
        }
      }
    }
    template <int FORMS>
    void pack_tile(const float* tile, int64_t stride, int64_t keys, int64_t queries) {
      static_assert(FORMS & kLeft);
      constexpr bool kPairs = FORMS & kRight;
      bf16* rows = rows_.reserve<bf16>(kKeys * stride);
      uint32_t* pairs = pairs_.reserve<uint32_t>(kPairs ? kKeys / 2 * stride : 0);
      amx::round_tile<kPairs>(tile, stride, keys, queries, stride, rows, pairs);
      left_ = {rows, stride};
      right_ = {pairs, stride};
    }
    void begin_weights(float*, int64_t stride, int64_t keys) {
      uint32_t* pairs = pairs_.reserve<uint32_t>(kKeys / 2 * stride);
      const int64_t made = (keys + 1) / 2, read = width(keys) / 2;
      std::memset(pairs + made * stride, 0, (read - made) * stride * sizeof *pairs);
      right_ = {pairs, stride};
      weights_ = pairs;
    }
    GPTFAST_INLINE void put_weights(int64_t key, int64_t lane, f32v even, f32v odd) {
      amx::store_pairs(weights_ + key / 2 * right_.stride + lane, even, odd);
    }
    Left left() const { return left_; }
    Left left_transposed() const { return left_transposed_; }
    Right right() const { return right_; }
    Right right_transposed() const { return right_transposed_; }

   private:
    Left left_, left_transposed_;
    Right right_, right_transposed_;
    uint32_t* weights_;
    Scratch rows_, columns_, pairs_;
  };

  static void multiply(int64_t M, int64_t N, int64_t K, Left A, Right B, float* C, int64_t stride_c,
                       bool accumulate) {
    amx::multiply(M, N, K, A.data, A.stride, B.data, B.stride, C, stride_c, accumulate);
  }
};
#endif

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
