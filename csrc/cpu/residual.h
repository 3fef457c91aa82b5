// What the ops that add to the residual stream share: dropout's factors along a row, and calls by
// the storage types of a branch and of the stream.
#pragma once
#include <utility>

#include "isa.h"
#include "parallel.h"
#include "philox.h"

namespace gptfast::GPTFAST_ISA {
namespace {

// a0 b0 a1 b1 ... into two vectors
#if __has_builtin(__builtin_shufflevector)
template <std::size_t... i>
inline void zip(u32v a, u32v b, u32v out[2], std::index_sequence<i...>) {
  out[0] = __builtin_shufflevector(a, b, (i % 2 * W + i / 2)...);
  out[1] = __builtin_shufflevector(a, b, (i % 2 * W + W / 2 + i / 2)...);
}
inline void zip(u32v a, u32v b, u32v out[2]) { zip(a, b, out, std::make_index_sequence<W>{}); }
#else  // g++ 11
inline void zip(u32v a, u32v b, u32v out[2]) {
  constexpr uint32_t kWidth = W;
  const u32v lane = bit_cast<u32v>(lane_index()), from = lane % 2u * kWidth + lane / 2u;
  out[0] = __builtin_shuffle(a, b, from);
  out[1] = __builtin_shuffle(a, b, from + kWidth / 2);
}
#endif

// Factors z of one row of a matrix: column j is kept where 16 bits of the generator at counter
// (row, j / 8, 0, 0) are below `threshold`.
class RowDropout {
 public:
  RowDropout(int64_t threshold, int64_t seed)
      : threshold_(static_cast<uint32_t>(threshold)),
        scale_(threshold ? 65536.0f / threshold : 0.0f),
        seed_(static_cast<uint64_t>(seed)) {}

  // The N factors of a row, which stay valid until the thread's next call; null without dropout.
  const float* row(int64_t i, int64_t N) const {
    if (threshold_ >= 65536) return nullptr;
    static thread_local Scratch scratch;
    constexpr int kColumns = 8 * W;
    float* z = scratch.reserve((N + kColumns - 1) / kColumns * kColumns);
    for (int64_t j = 0; j < N; j += kColumns) {
      const u32v counters = bit_cast<u32v>(lane_index()) + static_cast<uint32_t>(j / 8);
      const Philox bits =
          philox(set1_u32(static_cast<uint32_t>(i)), counters, u32v{}, u32v{}, seed_);
      // A counter's four words, one after the other, are its eight columns in order.
      u32v words[4], even[2], odd[2];
      zip(bits.word[0], bits.word[2], even);
      zip(bits.word[1], bits.word[3], odd);
      zip(even[0], odd[0], words);
      zip(even[1], odd[1], words + 2);
      u16v drawn[8];
      std::memcpy(drawn, words, sizeof drawn);
      for (int k = 0; k < 8; ++k)
        store(z + j + k * W, select(widen(drawn[k]) < threshold_, set1(scale_), f32v{}));
    }
    return z;
  }

 private:
  uint32_t threshold_;
  float scale_;
  uint64_t seed_;
};

// Calls body with values of both storage types; a stream has the branch's, or is fp32.
template <class Body>
inline void with_stream_dtype(DType branch, DType stream, const Body& body) {
  with_dtype(branch, [&](auto t) {
    if (stream == branch)
      body(t, t);
    else
      body(t, float{});
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
