// Flash attention on the CPU: o = dropout(softmax(scale q k^T + mask)) v, and its gradients,
// without ever holding more than one tile of the T x S score matrix.
//
//   s_ij = scale q_i . k_j          (causal: only j <= i + S - T, the bottom-right diagonal)
//   lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij z_ij v_j
//   delta_i = do_i . o_i
//   dv_j = sum_i p_ij z_ij do_i
//   ds_ij = p_ij (z_ij do_i . v_j - delta_i)
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i
//
// z_ij is 1, or with dropout keep_ij / (1 - p), drawn by a counter-based generator from (seed,
// batch and head, i, j) and drawn again in backward. A row that may see no key has o = 0 and
// lse = -inf.
//
// Scores are kept transposed (a row per key, a lane per query): the running maximum and sum are
// then plain vector operations with no reduction across lanes, keys and values are used as they lie
// in memory, and only the query block is transposed, once. All arithmetic is fp32.
//
// Forward: up to four queries are handled one by one; otherwise one task per (batch, head, block of
// queries); it walks over the blocks of keys up to the diagonal. Backward: one task per (batch, key
// head), which adds dk and dv up in fp32 in the order of the query blocks: deterministic for any
// number of threads.
//
// Kernels take tuples (address and strides, shape, options) instead of some thirty scalars.
#include <cfloat>
#include <type_traits>

#include "gemm_tile.h"
#include "isa.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"

namespace gptfast {

struct Heads {  // (B, H, T, D) with contiguous D; strides in elements
  uintptr_t address;
  int64_t stride_b, stride_h, stride_t;
};
struct AttentionShape {
  int64_t B, H, H_kv, T, S, D;  // T queries, S keys
};
struct AttentionOptions {
  bool causal;
  float scale;
  int64_t dropout_threshold;  // of 2^16 scores, how many are kept; 2^16 without dropout
  int64_t seed;
};

}  // namespace gptfast

// lse: (B, H, T) fp32
DECLARE_KERNEL(attention_fwd, void(Heads q, Heads k, Heads v, Heads o, float* lse,
                                   AttentionShape shape, AttentionOptions options, DType dtype))
// dq may have address 0 (not wanted), and so may dk and dv together
DECLARE_KERNEL(attention_bwd, void(Heads dout, Heads q, Heads k, Heads v, Heads o, const float* lse,
                                   Heads dq, Heads dk, Heads dv, AttentionShape shape,
                                   AttentionOptions options, DType dtype))
// keep: (T, S) bytes, for tests: the mask of one head
DECLARE_KERNEL(attention_dropout_mask,
               void(uint8_t* keep, int64_t head, AttentionShape shape, AttentionOptions options))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kQueries = 64;  // lanes of a score tile: 4 vectors of AVX-512
constexpr int64_t kKeys = 64;  // rows of a score tile: tile, keys and values take 48 KiB at D = 64

constexpr int64_t kFewQueries = 4;  // up to here a quarter of a tile's lanes at most would be used

inline int64_t ceil_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
T* row(Heads x, int64_t b, int64_t h, int64_t t) {
  return reinterpret_cast<T*>(x.address) + b * x.stride_b + h * x.stride_h + t * x.stride_t;
}

// rows x D of storage type T to fp32 rows of width = D rounded up to W, padded with zeros, times
// `factor`
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t D, int64_t width, float factor,
               float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out_row = out + r * width;
    for_each_vector(D, [&](int64_t d, auto part) {
      store(out_row + d, part.load(x + r * stride + d) * factor);
    });
  }
}

// fp32 rows x D (row stride `width`) to D x `lanes`, lanes past `rows` zero
inline void transpose(const float* x, int64_t width, int64_t rows, int64_t D, int64_t lanes,
                      float* out) {
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t r = 0; r < rows; ++r) out[d * lanes + r] = x[r * width + d];
    for (int64_t r = rows; r < lanes; ++r) out[d * lanes + r] = 0;
  }
}

template <class T>
void unpack_rows(const float* x, int64_t width, int64_t rows, int64_t D, float factor, T* out,
                 int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for_each_vector(D, [&](int64_t d, auto part) {
      part.store(out + r * stride + d, part.load(x + r * width + d) * factor);
    });
}

// The last key that query i may see, plus one.
inline int64_t visible_keys(const AttentionShape& shape, const AttentionOptions& options,
                            int64_t i) {
  if (!options.causal) return shape.S;
  const int64_t end = i + 1 + shape.S - shape.T;
  return end < 0 ? 0 : smaller(end, shape.S);
}

// Dropout factors z of W queries from `query` on and 8 keys from `key` (a multiple of 8) on:
// 16 random bits each, kept where they are below (1 - p) 2^16.
struct Dropout {
  uint32_t threshold;
  float inverse_keep;
  uint64_t seed;

  explicit Dropout(const AttentionOptions& options)
      : threshold(static_cast<uint32_t>(options.dropout_threshold)),
        inverse_keep(threshold ? 65536.0f / threshold : 0.0f),
        seed(static_cast<uint64_t>(options.seed)) {}
  bool active() const { return threshold < 65536; }

  void factors(int64_t head, int64_t query, int64_t key, f32v z[8]) const {
    const Philox bits = philox(bit_cast<u32v>(lane_index()) + static_cast<uint32_t>(query),
                               set1_u32(static_cast<uint32_t>(key / 8)),
                               set1_u32(static_cast<uint32_t>(head)), u32v{}, seed);
    for (int i = 0; i < 8; ++i) {
      const u32v word = i % 2 ? bits.word[i / 2] >> 16 : bits.word[i / 2] & 0xffff;
      z[i] = select(word < threshold, set1(inverse_keep), f32v{});
    }
  }

  // tile: `keys` rows of `lanes` queries, multiplied by z
  void apply(float* tile, int64_t lanes, int64_t keys, int64_t head, int64_t query,
             int64_t key) const {
    for (int64_t m = 0; m < lanes; m += W)
      for (int64_t n = 0; n < keys; n += 8) {
        f32v z[8];
        factors(head, query + m, key + n, z);
        for (int64_t i = 0; i < 8 && n + i < keys; ++i) {
          float* at = tile + (n + i) * lanes + m;
          store(at, load(at) * z[i]);
        }
      }
  }
};

// Scores that the mask forbids become -inf. tile row n is key `key` + n, lane m is query
// `query` + m.
inline void mask_tile(float* tile, int64_t lanes, int64_t keys, int64_t query, int64_t key,
                      const AttentionShape& shape) {
  for (int64_t n = 0; n < keys; ++n) {
    // key + n <= query + m + S - T
    const int32_t first_query = static_cast<int32_t>(key + n - (shape.S - shape.T) - query);
    for (int64_t m = 0; m < lanes; m += W) {
      float* at = tile + n * lanes + m;
      const i32v allowed = lane_index() + static_cast<int32_t>(m) >= first_query;
      store(at, select(allowed, load(at), set1(-INFINITY)));
    }
  }
}

template <class T>
void forward_block(Heads q, Heads k, Heads v, Heads o, float* lse, const AttentionShape& shape,
                   const AttentionOptions& options, int64_t b, int64_t h, int64_t query) {
  const int64_t D = shape.D, width = ceil_to(D, W);
  const int64_t queries = smaller(kQueries, shape.T - query);
  const int64_t lanes = ceil_to(queries, W);
  const int64_t h_kv = h / (shape.H / shape.H_kv);
  const Dropout dropout(options);

  static thread_local Scratch scratch;
  float* q_rows =
      scratch.reserve((kQueries * 2 + kKeys * 2) * width + kKeys * kQueries + 3 * kQueries);
  float* q_t = q_rows + kQueries * width;  // D x lanes; later the rows of o
  float* k_rows = q_t + kQueries * width;
  float* v_rows = k_rows + kKeys * width;
  float* tile = v_rows + kKeys * width;
  float* running_max = tile + kKeys * kQueries;
  float* running_sum = running_max + kQueries;
  float* rescale = running_sum + kQueries;

  pack_rows(row<const T>(q, b, h, query), q.stride_t, queries, D, width, options.scale, q_rows);
  transpose(q_rows, width, queries, D, lanes, q_t);
  float* acc = q_rows;  // the rows are no longer needed: queries x width of the output
  std::memset(acc, 0, queries * width * sizeof(float));
  for (int64_t m = 0; m < lanes; ++m) running_max[m] = -FLT_MAX, running_sum[m] = 0;

  const int64_t key_end = visible_keys(shape, options, query + queries - 1);
  const int64_t unmasked_end = visible_keys(shape, options, query);
  for (int64_t key = 0; key < key_end; key += kKeys) {
    const int64_t keys = smaller(kKeys, key_end - key);
    pack_rows(row<const T>(k, b, h_kv, key), k.stride_t, keys, D, width, 1.0f, k_rows);
    pack_rows(row<const T>(v, b, h_kv, key), v.stride_t, keys, D, width, 1.0f, v_rows);
    gemm(keys, lanes, D, {k_rows, width, 1}, q_t, lanes, tile, lanes, false);
    if (key + keys > unmasked_end) mask_tile(tile, lanes, keys, query, key, shape);

    bool rescaled = false;
    for (int64_t m = 0; m < lanes; m += W) {
      const f32v old_max = load(running_max + m);
      f32v top = old_max;
      for (int64_t n = 0; n < keys; ++n) top = max(load(tile + n * lanes + m), top);
      const f32v factor = exp(old_max - top);
      f32v sum = load(running_sum + m) * factor;
      for (int64_t n = 0; n < keys; ++n) {
        const f32v p = exp(load(tile + n * lanes + m) - top);
        sum += p;
        store(tile + n * lanes + m, p);
      }
      store(running_max + m, top);
      store(running_sum + m, sum);
      store(rescale + m, factor);
      rescaled |= reduce_max(top - old_max) > 0;
    }
    if (dropout.active()) dropout.apply(tile, lanes, keys, b * shape.H + h, query, key);
    if (rescaled && key > 0)
      for (int64_t m = 0; m < queries; ++m)
        for (int64_t d = 0; d < width; d += W)
          store(acc + m * width + d, load(acc + m * width + d) * rescale[m]);
    gemm(queries, width, keys, {tile, 1, lanes}, v_rows, width, acc, width, true);
  }

  for (int64_t m = 0; m < queries; ++m) {
    const float sum = running_sum[m];
    unpack_rows(acc + m * width, width, 1, D, sum == 0 ? 0.0f : 1.0f / sum,
                row<T>(o, b, h, query + m), o.stride_t);
    lse[(b * shape.H + h) * shape.T + query + m] =
        sum == 0 ? -INFINITY : running_max[m] + std::log(sum);
  }
}

// One query against all keys, for decoding: scores lie along the keys, and keys and values are read
// as they are, once. A tile would leave all but one of its lanes unused.
template <class T>
void forward_query(Heads q, Heads k, Heads v, Heads o, float* lse, const AttentionShape& shape,
                   const AttentionOptions& options, int64_t b, int64_t h, int64_t query) {
  const int64_t D = shape.D, width = ceil_to(D, W);
  const int64_t h_kv = h / (shape.H / shape.H_kv);
  const int64_t keys = visible_keys(shape, options, query);

  static thread_local Scratch scratch;
  float* q_row = scratch.reserve(width + ceil_to(shape.S, W));
  float* p = q_row + width;
  pack_rows(row<const T>(q, b, h, query), 0, 1, D, width, options.scale, q_row);

  for (int64_t n = 0; n < keys; ++n) {
    const T* k_row = row<const T>(k, b, h_kv, n);
    f32v dot{};
    for_each_vector(D,
                    [&](int64_t d, auto part) { dot += part.load(k_row + d) * load(q_row + d); });
    p[n] = reduce_add(dot);
  }
  f32v top = set1(-FLT_MAX), sum{};
  for_each_vector(keys, [&](int64_t n, auto part) {
    top = max(part.live(part.load(p + n), set1(-FLT_MAX)), top);
  });
  const float highest = reduce_max(top);
  for_each_vector(keys, [&](int64_t n, auto part) {
    const f32v prob = part.live(exp(part.load(p + n) - highest), f32v{});
    sum += prob;
    part.store(p + n, prob);
  });
  const float total = reduce_add(sum), scale = total == 0 ? 0.0f : 1.0f / total;
  T* out = row<T>(o, b, h, query);
  for_each_vector(D, [&](int64_t d, auto part) {
    f32v acc[4] = {};  // four sums, to hide the latency of the addition
    const T* v_row = row<const T>(v, b, h_kv, 0) + d;
    int64_t n = 0;
    for (; n + 4 <= keys; n += 4)
      for (int64_t i = 0; i < 4; ++i) acc[i] += p[n + i] * part.load(v_row + (n + i) * v.stride_t);
    for (; n < keys; ++n) acc[0] += p[n] * part.load(v_row + n * v.stride_t);
    part.store(out + d, (acc[0] + acc[1] + (acc[2] + acc[3])) * scale);
  });
  lse[(b * shape.H + h) * shape.T + query] = total == 0 ? -INFINITY : highest + std::log(total);
}

// All gradients that come from the heads of q that share key head h_kv.
template <class T>
void backward_head(Heads dout, Heads q, Heads k, Heads v, Heads o, const float* lse, Heads dq,
                   Heads dk, Heads dv, const AttentionShape& shape, const AttentionOptions& options,
                   int64_t b, int64_t h_kv) {
  const int64_t D = shape.D, width = ceil_to(D, W), group = shape.H / shape.H_kv;
  const int64_t S = shape.S;
  const bool want_dq = dq.address, want_dkv = dk.address;
  const Dropout dropout(options);

  static thread_local Scratch scratch;
  float* k_rows =
      scratch.reserve(S * width * 4 + kQueries * width * 5 + kKeys * kQueries * 2 + 2 * kQueries);
  float* v_rows = k_rows + S * width;
  float* dk_acc = v_rows + S * width;
  float* dv_acc = dk_acc + S * width;
  float* q_rows = dv_acc + S * width;
  float* do_rows = q_rows + kQueries * width;
  float* q_t = do_rows + kQueries * width;
  float* do_t = q_t + kQueries * width;
  float* dq_acc = do_t + kQueries * width;
  float* p = dq_acc + kQueries * width;
  float* ds = p + kKeys * kQueries;
  float* row_lse = ds + kKeys * kQueries;
  float* delta = row_lse + kQueries;

  pack_rows(row<const T>(k, b, h_kv, 0), k.stride_t, S, D, width, 1.0f, k_rows);
  pack_rows(row<const T>(v, b, h_kv, 0), v.stride_t, S, D, width, 1.0f, v_rows);
  std::memset(dk_acc, 0, 2 * S * width * sizeof(float));

  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    for (int64_t query = 0; query < shape.T; query += kQueries) {
      const int64_t queries = smaller(kQueries, shape.T - query);
      const int64_t lanes = ceil_to(queries, W);
      pack_rows(row<const T>(q, b, h, query), q.stride_t, queries, D, width, options.scale, q_rows);
      pack_rows(row<const T>(dout, b, h, query), dout.stride_t, queries, D, width, 1.0f, do_rows);
      transpose(q_rows, width, queries, D, lanes, q_t);
      transpose(do_rows, width, queries, D, lanes, do_t);
      for (int64_t m = 0; m < lanes; ++m) {
        // A row that saw no key, or a lane past the end: exp(s - inf) = 0.
        const float l = m < queries ? lse[(b * shape.H + h) * shape.T + query + m] : -INFINITY;
        row_lse[m] = l == -INFINITY ? INFINITY : l;
        f32v dot{};
        if (m < queries)
          for_each_vector(D, [&](int64_t d, auto part) {
            dot += part.load(row<const T>(o, b, h, query + m) + d) *
                   part.load(do_rows + m * width + d);
          });
        delta[m] = reduce_add(dot);
      }
      std::memset(dq_acc, 0, queries * width * sizeof(float));

      const int64_t key_end = visible_keys(shape, options, query + queries - 1);
      const int64_t unmasked_end = visible_keys(shape, options, query);
      for (int64_t key = 0; key < key_end; key += kKeys) {
        const int64_t keys = smaller(kKeys, key_end - key);
        gemm(keys, lanes, D, {k_rows + key * width, width, 1}, q_t, lanes, p, lanes, false);
        gemm(keys, lanes, D, {v_rows + key * width, width, 1}, do_t, lanes, ds, lanes, false);
        if (key + keys > unmasked_end) mask_tile(p, lanes, keys, query, key, shape);
        if (dropout.active()) dropout.apply(ds, lanes, keys, b * shape.H + h, query, key);
        for (int64_t n = 0; n < keys; ++n)
          for (int64_t m = 0; m < lanes; m += W) {
            const f32v prob = exp(load(p + n * lanes + m) - load(row_lse + m));
            store(p + n * lanes + m, prob);
            store(ds + n * lanes + m, prob * (load(ds + n * lanes + m) - load(delta + m)));
          }
        if (want_dq)
          gemm(queries, width, keys, {ds, 1, lanes}, k_rows + key * width, width, dq_acc, width,
               true);
        if (want_dkv) {
          gemm(keys, width, queries, {ds, lanes, 1}, q_rows, width, dk_acc + key * width, width,
               true);
          if (dropout.active()) dropout.apply(p, lanes, keys, b * shape.H + h, query, key);
          gemm(keys, width, queries, {p, lanes, 1}, do_rows, width, dv_acc + key * width, width,
               true);
        }
      }
      if (want_dq)
        unpack_rows(dq_acc, width, queries, D, options.scale, row<T>(dq, b, h, query), dq.stride_t);
    }
  }
  if (want_dkv) {  // q_rows carried the scale into dk already
    unpack_rows(dk_acc, width, S, D, 1.0f, row<T>(dk, b, h_kv, 0), dk.stride_t);
    unpack_rows(dv_acc, width, S, D, 1.0f, row<T>(dv, b, h_kv, 0), dv.stride_t);
  }
}

void attention_fwd(Heads q, Heads k, Heads v, Heads o, float* lse, AttentionShape shape,
                   AttentionOptions options, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t heads = shape.B * shape.H, flops = 4 * heads * shape.T * shape.S * shape.D;
    if (shape.T <= kFewQueries && options.dropout_threshold == 65536) {
      parallel_for_dynamic(heads * shape.T, flops, [&](int64_t task) {
        const int64_t head = task / shape.T;
        forward_query<T>(q, k, v, o, lse, shape, options, head / shape.H, head % shape.H,
                         task % shape.T);
      });
      return;
    }
    const int64_t blocks = (shape.T + kQueries - 1) / kQueries;
    parallel_for_dynamic(heads * blocks, flops, [&](int64_t task) {
      const int64_t head = task / blocks;
      const int64_t block = blocks - 1 - task % blocks;  // the longest causal rows first
      forward_block<T>(q, k, v, o, lse, shape, options, head / shape.H, head % shape.H,
                       block * kQueries);
    });
  });
}

void attention_bwd(Heads dout, Heads q, Heads k, Heads v, Heads o, const float* lse, Heads dq,
                   Heads dk, Heads dv, AttentionShape shape, AttentionOptions options,
                   DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t flops = 10 * shape.B * shape.H * shape.T * shape.S * shape.D;
    parallel_for_dynamic(shape.B * shape.H_kv, flops, [&](int64_t task) {
      backward_head<T>(dout, q, k, v, o, lse, dq, dk, dv, shape, options, task / shape.H_kv,
                       task % shape.H_kv);
    });
  });
}

void attention_dropout_mask(uint8_t* keep, int64_t head, AttentionShape shape,
                            AttentionOptions options) {
  const Dropout dropout(options);
  for (int64_t i = 0; i < shape.T; i += W)
    for (int64_t j = 0; j < shape.S; j += 8) {
      f32v z[8];
      dropout.factors(head, i, j, z);
      for (int64_t n = 0; n < 8 && j + n < shape.S; ++n)
        for (int64_t m = 0; m < W && i + m < shape.T; ++m)
          keep[(i + m) * shape.S + j + n] = z[n][m] != 0;
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(attention_fwd)
REGISTER_KERNEL(attention_bwd)
REGISTER_KERNEL(attention_dropout_mask)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
namespace gptfast {
template <>
struct FromPython<Heads> {
  using type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  static Heads get(type t) {
    return std::apply([](auto... field) { return Heads{field...}; }, t);
  }
};
template <>
struct FromPython<AttentionShape> {
  using type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  static AttentionShape get(type t) {
    return std::apply([](auto... field) { return AttentionShape{field...}; }, t);
  }
};
template <>
struct FromPython<AttentionOptions> {
  using type = std::tuple<bool, float, int64_t, int64_t>;
  static AttentionOptions get(type t) {
    return std::apply([](auto... field) { return AttentionOptions{field...}; }, t);
  }
};
}  // namespace gptfast
void register_attention(pybind11::module_& m) {
  gptfast::bind_kernel(m, "attention_fwd", gptfast::kernel_attention_fwd);
  gptfast::bind_kernel(m, "attention_bwd", gptfast::kernel_attention_bwd);
  gptfast::bind_kernel(m, "attention_dropout_mask", gptfast::kernel_attention_dropout_mask);
}
#endif
