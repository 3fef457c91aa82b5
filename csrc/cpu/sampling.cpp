// The next token of each row of logits, B rows of V. The maths stands in gptfast/ops/sample.py.
//
// A row is a matter of one thread. Weights are whole numbers, so their sums are exact in any order;
// the last token that top_k or top_p keeps is found digit by digit of its key, highest first, from the
// amounts that the tokens with each digit have.
#include <cmath>
#include <cstring>

#include "../common/sampling.h"
#include "isa.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"

// Rows of logits are stride_row elements apart, rows of `previous` (B, P) stride_previous; steps 0 is
// greedy. tokens (B); -1 where a row has NaN or infinity, or nothing above minus infinity.
DECLARE_KERNEL(sample, void(const void* logits, int64_t stride_row, const int64_t* previous,
                            int64_t stride_previous, int64_t P, int64_t* tokens, int64_t B,
                            int64_t V, float penalty, float steps, int64_t top_k, int64_t share,
                            int64_t min_weight, uint64_t seed, uint64_t offset, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kTokensPerThread = 16384;  // some 20 us: what a fork is worth
constexpr int64_t kChunk = 512;              // tokens whose weights are summed before one is drawn

struct Digit {  // of a key
  int shift, bits;
};
constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};
constexpr int kBins = 2048;

// ---- Vectors: what sampling.h says of one token, for W of them ---------------------------------

typedef int64_t i64v __attribute__((vector_size(W * 4)));

// The lanes with even numbers, and those with odd ones.
struct Halves {
  i64v even, odd;
};
inline Halves split(u32v v) {
  typedef uint64_t u64v __attribute__((vector_size(W * 4)));
  const u64v pairs = bit_cast<u64v>(v);
  return {bit_cast<i64v>(pairs & 0xffffffffu), bit_cast<i64v>(pairs >> 32)};
}
inline Halves split_mask(i32v mask) {
  const i64v pairs = bit_cast<i64v>(mask);
  return {pairs << 32 >> 32, pairs >> 32};
}

inline u32v multiply_high(u32v a, u32v b) {
  const Halves x = split(a), y = split(b);
#if GPTFAST_VECTOR_BYTES == 64
  const i64v even = (i64v)_mm512_mul_epu32((__m512i)x.even, (__m512i)y.even);
  const i64v odd = (i64v)_mm512_mul_epu32((__m512i)x.odd, (__m512i)y.odd);
#elif GPTFAST_VECTOR_BYTES == 32
  const i64v even = (i64v)_mm256_mul_epu32((__m256i)x.even, (__m256i)y.even);
  const i64v odd = (i64v)_mm256_mul_epu32((__m256i)x.odd, (__m256i)y.odd);
#else
  const i64v even = x.even * y.even, odd = x.odd * y.odd;
#endif
  return bit_cast<u32v>((even >> 32 & 0xffffffff) | (odd & ~int64_t{0xffffffff}));
}

inline u32v rank_keys(f32v z) {
  const i32v bits = bit_cast<i32v>(z + 0.0f);  // 0 where it was -0
  const u32v key = bit_cast<u32v>(bits) ^ (bit_cast<u32v>(bits >> 31) | 0x80000000u);
  return (z == z) ? key : set1_u32(0xffffffffu);
}
inline f32v floats_of_keys(u32v key) {
  return bit_cast<f32v>(key ^ (bit_cast<u32v>(~bit_cast<i32v>(key) >> 31) | 0x80000000u));
}

inline Halves token_weights(f32v distance, float steps) {
  const f32v product = distance * steps;
  const i32v n = __builtin_convertvector(min(product, set1(kFarthest)), i32v);
  const u32v f = bit_cast<u32v>(n) << 8;
  u32v p = kPower5 - multiply_high(f, set1_u32(kPower6));
  p = kPower4 - multiply_high(f, p);
  p = kPower3 - multiply_high(f, p);
  p = kPower2 - multiply_high(f, p);
  p = kPower1 - multiply_high(f, p);
  p = kPower0 - multiply_high(f, p);
  const i32v whole = n >> 24;
  const Halves mantissa = split(p), shift = split(bit_cast<u32v>(whole < 63 ? whole : 63 - i32v{}));
  return {mantissa.even << 9 >> shift.even, mantissa.odd << 9 >> shift.odd};
}

// ---- A row -------------------------------------------------------------------------------------

// The tokens that are kept: those with a higher key, and with this key up to the token `last`.
struct Cut {
  uint32_t key = 0;
  int64_t last = 0;
};

// Keys and weights of the tokens, filled up to whole vectors with tokens that weigh nothing. Of each
// W weights the even ones come first.
struct Row {
  int64_t V;
  uint32_t* key;
  int64_t* weight;

  int64_t& weight_of(int64_t v) const { return weight[v / W * W + v % 2 * (W / 2) + v % W / 2]; }

  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t v = 0; v < V; v += W) body(v);
  }
  u32v keys(int64_t v) const { return bit_cast<u32v>(load(reinterpret_cast<float*>(key + v))); }
  i64v load_weights(int64_t at) const {
    i64v w;
    std::memcpy(&w, weight + at, sizeof w);
    return w;
  }
  void store_weights(int64_t v, const Halves& w) const {
    std::memcpy(weight + v, &w.even, sizeof w.even);
    std::memcpy(weight + v + W / 2, &w.odd, sizeof w.odd);
  }

  uint32_t highest_key() const {
    u32v highest{};
    for_each([&](int64_t v) { highest = keys(v) > highest ? keys(v) : highest; });
    uint32_t result = 0;
    for (int i = 0; i < W; ++i) result = highest[i] > result ? highest[i] : result;
    return result;
  }

  // Fills in the weights; returns their sum.
  uint64_t weigh(float top, float steps) const {
    i64v sum{};
    for_each([&](int64_t v) {
      const Halves w = token_weights(top - floats_of_keys(keys(v)), steps);
      store_weights(v, w);
      sum += w.even + w.odd;
    });
    return total_of(sum);
  }

  // Takes the weight from all that is not kept; returns the sum of the others.
  uint64_t keep(const Cut& cut, int64_t min_weight) const {
    i64v sum{};
    for_each([&](int64_t v) {
      const u32v k = keys(v);
      const i32v token = lane_index() + static_cast<int32_t>(v);
      const i32v kept =
          (k > cut.key) | ((k == cut.key) & (token <= static_cast<int32_t>(cut.last)));
      const Halves mask = split_mask(kept);
      const i64v even = load_weights(v) & mask.even, odd = load_weights(v + W / 2) & mask.odd;
      const Halves w{even & (even >= min_weight), odd & (odd >= min_weight)};
      store_weights(v, w);
      sum += w.even + w.odd;
    });
    return total_of(sum);
  }

  // Where tokens are kept in the order of their keys until their amounts reach `wanted`.
  template <class Amount>
  Cut cut(uint64_t wanted, const Amount& amount) const {
    uint64_t bins[kBins];
    uint64_t before = 0, prefix = 0;
    for (const auto& [shift, bits] : kDigits) {
      std::memset(bins, 0, sizeof bins);
      for (int64_t v = 0; v < V; ++v)
        if (uint64_t{key[v]} >> (shift + bits) == prefix)
          bins[(key[v] >> shift) & ((1u << bits) - 1)] += amount(v);
      int bin = (1 << bits) - 1;
      for (; before + bins[bin] < wanted; --bin) before += bins[bin];
      prefix = prefix << bits | static_cast<uint64_t>(bin);
    }
    Cut cut{static_cast<uint32_t>(prefix), -1};
    for (; before < wanted; before += amount(cut.last)) do
        ++cut.last;
      while (key[cut.last] != cut.key);
    return cut;
  }

  // The token in which the sum of the weights passes `place`.
  int64_t token_at(uint64_t place) const {
    int64_t v = 0;
    for (; v + kChunk < V; v += kChunk) {
      i64v sum{};
      for (int64_t i = v; i < v + kChunk; i += W / 2) sum += load_weights(i);
      const uint64_t chunk = total_of(sum);
      if (chunk > place) break;
      place -= chunk;
    }
    for (; static_cast<uint64_t>(weight_of(v)) <= place; ++v) place -= weight_of(v);
    return v;
  }

 private:
  static uint64_t total_of(i64v sums) {
    uint64_t total = 0;
    for (int i = 0; i < W / 2; ++i) total += static_cast<uint64_t>(sums[i]);
    return total;
  }
};

template <class T>
int64_t sample_row(const T* logits, int64_t V, const int64_t* previous, int64_t P,
                   const SamplingRule& rule, uint32_t word0, uint32_t word1) {
  static thread_local Scratch scratch;
  const int64_t padded = ceil_to(V, W);
  auto* weight = scratch.reserve<int64_t>(padded + padded / 2);
  const Row row{V, reinterpret_cast<uint32_t*>(weight + padded), weight};
  for_each_vector(V, [&](int64_t v, auto part) {
    const u32v key = rank_keys(part.live(part.load(logits + v), set1(-INFINITY)));
    std::memcpy(row.key + v, &key, sizeof key);
  });
  for (int64_t i = 0; i < P; ++i) {
    const int64_t v = previous[i];
    if (v < 0 || v >= V) continue;
    const f32v lanes = load_n(logits + v, 1);
    row.key[v] = rank_key(lanes[0] < 0 ? lanes[0] * rule.penalty : lanes[0] / rule.penalty);
  }
  const uint32_t highest = row.highest_key();
  if (highest >= kKeyOfInfinity || highest <= kKeyOfMinusInfinity) return -1;
  if (rule.steps == 0) {
    int64_t v = 0;
    while (row.key[v] != highest) ++v;
    return v;
  }
  uint64_t total = row.weigh(float_of_key(highest), rule.steps);
  Cut cut{0, V};
  if (rule.top_k < V) {
    cut = row.cut(static_cast<uint64_t>(rule.top_k), [](int64_t) { return uint64_t{1}; });
    total = row.keep(cut, 0);
  }
  const uint64_t wanted = share_of(total, rule.share);
  if (wanted < total)
    cut = row.cut(wanted, [&](int64_t v) { return static_cast<uint64_t>(row.weight_of(v)); });
  if (wanted < total || rule.min_weight > 0)
    total = row.keep(cut, static_cast<int64_t>(rule.min_weight));
  return row.token_at(place_in(total, word0, word1));
}

void sample(const void* logits, int64_t stride_row, const int64_t* previous,
            int64_t stride_previous, int64_t P, int64_t* tokens, int64_t B, int64_t V,
            float penalty, float steps, int64_t top_k, int64_t share, int64_t min_weight,
            uint64_t seed, uint64_t offset, DType dtype) {
  const SamplingRule rule{penalty, steps, top_k, share, static_cast<uint64_t>(min_weight)};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(B, kTokensPerThread / V + 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Philox random =
            philox(set1_u32(static_cast<uint32_t>(b)), set1_u32(static_cast<uint32_t>(offset)),
                   set1_u32(static_cast<uint32_t>(offset >> 32)), set1_u32(1), seed);
        tokens[b] = sample_row(static_cast<const T*>(logits) + b * stride_row, V,
                               previous + b * stride_previous, P, rule, random.word[0][0],
                               random.word[1][0]);
      }
    });
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(sample)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_sampling(pybind11::module_& m) {
  gptfast::bind_kernel(m, "sample", gptfast::kernel_sample);
}
#endif
