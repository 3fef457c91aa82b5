// What happens to a tile of scores between the products of attention: softcap, ALiBi, mask, softmax,
// dropout, and the gradient of all that.
//
// A tile has a row per key and a lane per query, rows of `stride` floats. So a query's maximum and sum
// are plain vector operations with no reduction across lanes. Scores are turned into powers of two:
// s log2(e), with the running maximum and the log-sum-exp in the same unit.
#pragma once
#include <cfloat>

#include "attention_products.h"
#include "philox.h"
#include "simd.h"

namespace gptfast {

struct AttentionOptions {
  float scale;
  int64_t left, right;  // keys before and behind the diagonal; negative: all
  float softcap;        // 0: none
  const float* slopes;  // of ALiBi, (B, H), or null
  int64_t stride_slopes_b, stride_slopes_h;
  int64_t dropout_threshold;  // of 2^16 scores, how many are kept; 2^16 without dropout
  int64_t seed;
};

}  // namespace gptfast

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr float kLn2 = 0.693147181f;

// Dropout factors z of W queries from `query` on and 8 keys from `key` (a multiple of 8) on:
// 16 random bits each, kept where they are below (1 - p) 2^16.
struct Dropout {
  uint32_t threshold;
  float inverse_keep;
  uint64_t seed;
  uint32_t head;  // index of (batch, head)

  Dropout(const AttentionOptions& options, int64_t head)
      : threshold(static_cast<uint32_t>(options.dropout_threshold)),
        inverse_keep(threshold ? 65536.0f / threshold : 0.0f),
        seed(static_cast<uint64_t>(options.seed)),
        head(static_cast<uint32_t>(head)) {}
  bool active() const { return threshold < 65536; }

  void factors(int64_t query, int64_t key, f32v z[8]) const {
    const Philox bits =
        philox(bit_cast<u32v>(lane_index()) + static_cast<uint32_t>(query),
               set1_u32(static_cast<uint32_t>(key / 8)), set1_u32(head), u32v{}, seed);
    for (int i = 0; i < 8; ++i) {
      const u32v word = i % 2 ? bits.word[i / 2] >> 16 : bits.word[i / 2] & 0xffff;
      z[i] = select(word < threshold, set1(inverse_keep), f32v{});
    }
  }
};

// The part of a tile that exists: `keys` rows and `queries` of its `stride` lanes, at (query, key) of
// the matrix.
struct TileShape {
  int64_t query, queries, key, keys, stride;
  int64_t lanes() const { return ceil_to(queries, W); }
};

// Which keys a query sees: those of the band  -left <= j - (i + S - T) <= right.
class Band {
 public:
  Band(const AttentionOptions& options, int64_t T, int64_t S)
      : S_(S),
        diagonal_(S - T),
        left_(options.left < 0 ? T + S : smaller(options.left, T + S)),
        right_(options.right < 0 ? T + S : smaller(options.right, T + S)) {}

  // The first key that query i sees, and the one behind the last. Neither decreases with i.
  int64_t begin(int64_t i) const { return smaller(larger(i + diagonal_ - left_, 0), S_); }
  int64_t end(int64_t i) const { return smaller(larger(i + diagonal_ + right_ + 1, 0), S_); }

  // Keys [*first, *last) of [begin, end), in steps of kKeys, that queries [query, query_end) see;
  // empty: *first >= *last.
  void blocks(int64_t query, int64_t query_end, int64_t* first, int64_t* last) const {
    *first = larger(*first, begin(query) / kKeys * kKeys);
    *last = smaller(*last, end(query_end - 1));
  }
  // Whether every query of a tile sees every key of it, and whether any sees any.
  bool covers(const TileShape& at) const {
    return begin(at.query + at.queries - 1) <= at.key && at.key + at.keys <= end(at.query);
  }
  bool touches(const TileShape& at) const {
    return begin(at.query) < at.key + at.keys && at.key < end(at.query + at.queries - 1);
  }

  int64_t diagonal() const { return diagonal_; }
  int64_t left() const { return left_; }
  int64_t right() const { return right_; }

 private:
  int64_t S_, diagonal_, left_, right_;
};

class Scores {
 public:
  Scores(const AttentionOptions& options, int64_t T, int64_t S, int64_t b, int64_t h, int64_t H)
      : band(options, T, S),
        dropout(options, b * H + h),
        scale_(options.scale),
        softcap_(options.softcap),
        slope_(options.slopes
                   ? options.slopes[b * options.stride_slopes_b + h * options.stride_slopes_h]
                   : 0.0f) {}

  const Band band;
  const Dropout dropout;

  bool has_softcap() const { return softcap_ != 0; }

  // The score of x = q . k before ALiBi and the mask; with softcap also ds / d(scale x).
  GPTFAST_INLINE f32v capped(f32v x) const {
    return has_softcap() ? softcap_ * tanh(x * (scale_ / softcap_)) : x * scale_;
  }
  GPTFAST_INLINE f32v capped(f32v x, f32v* slope) const {
    return softcap_ * tanh(x * (scale_ / softcap_), slope);
  }
  // The score at a distance from the diagonal, before the mask, in units of log2.
  GPTFAST_INLINE f32v of(f32v x, f32v distance) const { return at_distance(capped(x), distance); }

  // tile: q . k, which becomes the score, -inf where it is masked, up to the factor that is
  // returned and not negative; damping: with softcap, `slope` of each score, or null.
  float finish(float* tile, const TileShape& at, float* damping) const {
    const bool covered = band.covers(at);
    if (covered && !has_softcap() && slope_ == 0 && scale_ >= 0) return scale_ * kLog2E;
    for (int64_t n = 0; n < at.keys; ++n) {
      // distance of key n from the diagonal of query 0
      const int64_t distance = at.key + n - band.diagonal() - at.query;
      const int32_t first_lane = clamp_lane(distance - band.right());
      const int32_t last_lane = clamp_lane(distance + band.left());
      for (int64_t m = 0; m < at.lanes(); m += W) {
        float* score = tile + n * at.stride + m;
        const f32v x = load(score);
        const f32v far = static_cast<float>(distance - m) - lane_numbers();
        f32v s, slope;
        if (damping) {
          s = at_distance(capped(x, &slope), far);
          store(damping + n * at.stride + m, slope);
        } else {
          s = of(x, far);
        }
        if (!covered) {
          const i32v lane = lane_index() + static_cast<int32_t>(m);
          s = select((lane >= first_lane) & (lane <= last_lane), s, set1(-INFINITY));
        }
        store(score, s);
      }
    }
    return 1.0f;
  }

 private:
  GPTFAST_INLINE f32v at_distance(f32v s, f32v distance) const {
    if (slope_ != 0) s -= slope_ * abs(distance);
    return s * kLog2E;
  }
  static int32_t clamp_lane(int64_t lane) {
    return static_cast<int32_t>(smaller(larger(lane, -1), kMostQueries));
  }
  float scale_, softcap_, slope_;
};

// Calls body(n, z, z') for every second key n of a tile, with the dropout factors of W queries from
// lane m on for keys n and n + 1.
template <bool DROPOUT, class Body>
inline void for_each_two_keys(const Dropout& dropout, const TileShape& at, int64_t m,
                              const Body& body) {
  for (int64_t n = 0; n < at.keys; n += 8) {
    f32v z[8] = {};
    if constexpr (DROPOUT) dropout.factors(at.query + m, at.key + n, z);
    for (int64_t i = 0; i < 8 && n + i < at.keys; i += 2) body(n + i, z[i], z[i + 1]);
  }
}

// The softmax of each query over the keys seen so far.
struct Softmax {
  alignas(64) float top[kMostQueries], sum[kMostQueries], rescale[kMostQueries];

  void clear() {
    for (int64_t m = 0; m < kMostQueries; ++m) top[m] = -FLT_MAX, sum[m] = 0;
  }

  // tile times `factor`: scores, of which p z goes to `weights`. Returns whether what was summed up
  // before must be multiplied by `rescale`. The maximum moves only when it is exceeded by 2^kSlack,
  // for what matters is that p stays far from the ends of fp32, and that is seldom after the first
  // tile.
  template <bool DROPOUT, class Operand>
  bool add(float* tile, const TileShape& at, float factor, const Dropout& dropout,
           Operand& weights) {
    weights.begin_weights(tile, at.stride, at.keys);
    constexpr float kSlack = 8;
    bool moved = false;
    for (int64_t m = 0; m < at.lanes(); m += W) {
      const f32v old_top = load(top + m), highest = maximum(tile + m, at) * factor;
      const f32v new_top = select(highest > old_top + kSlack, highest, old_top);
      const f32v correction = exp2(old_top - new_top);
      moved |= reduce_max(new_top - old_top) > 0;
      store(top + m, new_top);
      store(rescale + m, correction);

      f32v total = load(sum + m) * correction;
      auto weigh = [&](int64_t n, f32v z) {
        const f32v p = exp2(load(tile + n * at.stride + m) * factor - new_top);
        total += p;
        return DROPOUT ? p * z : p;
      };
      for_each_two_keys<DROPOUT>(dropout, at, m, [&](int64_t n, f32v z_even, f32v z_odd) {
        const f32v even = weigh(n, z_even);
        weights.put_weights(n, m, even, n + 1 < at.keys ? weigh(n + 1, z_odd) : f32v{});
      });
      store(sum + m, total);
    }
    return moved;
  }

  // What was summed up before, a row of `at.stride` lanes for each of `rows` sums, times `rescale`.
  void apply_rescale(float* sums, int64_t rows, const TileShape& at) const {
    for (int64_t d = 0; d < rows; ++d)
      for (int64_t m = 0; m < at.lanes(); m += W) {
        float* number = sums + d * at.stride + m;
        store(number, load(number) * load(rescale + m));
      }
  }

 private:
  static f32v maximum(const float* column, const TileShape& at) {
    f32v top[4];  // four of them, to hide the latency of max
    for (f32v& t : top) t = set1(-FLT_MAX);
    int64_t n = 0;
    for (; n + 4 <= at.keys; n += 4)
      for (int64_t i = 0; i < 4; ++i) top[i] = max(load(column + (n + i) * at.stride), top[i]);
    for (; n < at.keys; ++n) top[0] = max(load(column + n * at.stride), top[0]);
    return max(max(top[0], top[1]), max(top[2], top[3]));
  }
};

// scores times `factor` become p z; dp, which holds do . v, becomes ds. lse in units of log2.
template <bool DROPOUT, bool DAMPED>
void score_gradients(float* scores, float* dp, const TileShape& at, float factor, const float* lse,
                     const float* delta, const float* damping, const Dropout& dropout) {
  for (int64_t m = 0; m < at.lanes(); m += W) {
    const f32v row_lse = load(lse + m), row_delta = load(delta + m);
    const auto one_key = [&](int64_t n, f32v z) {
      const int64_t element = n * at.stride + m;
      const f32v p = exp2(load(scores + element) * factor - row_lse);
      f32v ds = load(dp + element);
      ds = p * (DROPOUT ? ds * z - row_delta : ds - row_delta);
      if constexpr (DAMPED) ds *= load(damping + element);
      store(scores + element, DROPOUT ? p * z : p);
      store(dp + element, ds);
    };
    for_each_two_keys<DROPOUT>(dropout, at, m, [&](int64_t n, f32v z_even, f32v z_odd) {
      one_key(n, z_even);
      if (n + 1 < at.keys) one_key(n + 1, z_odd);
    });
  }
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
namespace gptfast {
template <>
struct FromPython<AttentionOptions> {
  // scale, left, right, softcap, (slopes, stride_slopes_b, stride_slopes_h), dropout_threshold, seed
  using type = std::tuple<float, int64_t, int64_t, float, std::tuple<uintptr_t, int64_t, int64_t>,
                          int64_t, int64_t>;
  static AttentionOptions get(type t) {
    const auto [scale, left, right, softcap, slopes, threshold, seed] = t;
    const auto [address, stride_b, stride_h] = slopes;
    return {scale,    left,     right,     softcap, reinterpret_cast<const float*>(address),
            stride_b, stride_h, threshold, seed};
  }
};
}  // namespace gptfast
#endif
