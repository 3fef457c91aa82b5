// Flash attention on the CPU: o = dropout(softmax(s + mask)) v, and its gradients, without ever
// holding more than a few tiles of the T x S score matrix. gptfast/ops/attention.py has the maths.
//
// Scores are kept transposed (a row per key, a lane per query), and so are o and dq while they grow:
//   s^T = k q^T,  o^T = v^T p^T
//   dp^T = v do^T,  dv = p^T do,  dk = ds^T q,  dq^T = k^T ds^T
// In bf16 all products run on the tiles of AMX, where there are any: p and ds are rounded to bf16 for
// theirs, and nothing else is. Otherwise all arithmetic is fp32.
//
// Forward: up to four queries are handled one by one; otherwise a task has a few blocks of
// queries and walks over the blocks of keys that they see. Backward: a task has a key head, all
// queries and all keys, and needs five products for each tile. Where that gives too few tasks for
// the threads, there are two kinds of tasks, for chunks of keys (dk and dv) and for blocks of queries
// (dq), which need seven. Every sum runs in the same order either way, so that results depend
// neither on the number of threads nor on chance.
//
// Kernels take tuples (address and strides, shape, options) instead of some thirty scalars. More than 500
// lines, since forward, both ways of backward and packed sequences share their tiles.
#include <algorithm>
#include <type_traits>

#include "attention_products.h"
#include "attention_scores.h"
#include "heads.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace gptfast {

struct AttentionShape {
  int64_t B, H, H_kv, T, S, D, Dv;  // T queries, S keys
  // Packed sequences: sequence b has tokens ends[b] to ends[b + 1] - 1; its stride_b is 0. Or null.
  const int32_t *ends_q, *ends_k;
  int64_t stride_lse_b, stride_lse_h;
};

}  // namespace gptfast

// lse: (B, H, T) fp32
DECLARE_KERNEL(attention_fwd, void(Heads q, Heads k, Heads v, Heads o, float* lse,
                                   AttentionShape shape, AttentionOptions options, DType dtype))
// dlse may be null; dq may have address 0 (not wanted), and so may dk and dv together
DECLARE_KERNEL(attention_bwd, void(Heads dout, Heads q, Heads k, Heads v, Heads o, const float* lse,
                                   const float* dlse, Heads dq, Heads dk, Heads dv,
                                   AttentionShape shape, AttentionOptions options, DType dtype))
// keep: (T, S) bytes, for tests: the mask of one head
DECLARE_KERNEL(attention_dropout_mask, void(uint8_t* keep, int64_t head, int64_t T, int64_t S,
                                            int64_t threshold, int64_t seed))

namespace gptfast::GPTFAST_ISA {
namespace {

// Up to here a sixteenth of a tile's lanes at most would be used.
constexpr int64_t kFewQueries = 4;
// Blocks of queries of a backward task that share the packing of keys and values, which costs some
// tenth of what one of them does with these.
constexpr int64_t kBackwardSharing = 8;
// Keys, values and their gradients of a chunk fill half of a second-level cache of 1 MiB at D = 64.
constexpr int64_t kChunk = 8 * kKeys;

// One of the sequences: its lengths, and where it begins in tensors of packed sequences.
struct Sequence {
  int64_t T, S, first_q, first_k;

  Sequence(const AttentionShape& shape, int64_t b)
      : T(shape.T), S(shape.S), first_q(0), first_k(0) {
    if (!shape.ends_q) return;
    first_q = shape.ends_q[b], T = shape.ends_q[b + 1] - first_q;
    first_k = shape.ends_k[b], S = shape.ends_k[b + 1] - first_k;
  }
};

inline int64_t lse_index(const AttentionShape& shape, int64_t b, int64_t h, int64_t t) {
  return b * shape.stride_lse_b + h * shape.stride_lse_h + t;
}

// Numbers the tasks of all sequences: `tasks_of(sequence)` for each.
class Tasks {
 public:
  template <class Count>
  Tasks(const AttentionShape& shape, const Count& tasks_of)
      : sequences_(shape.B), ends_(memory_.reserve<int64_t>(shape.B)) {
    for (int64_t b = 0; b < shape.B; ++b)
      ends_[b] = (b ? ends_[b - 1] : 0) + tasks_of(Sequence(shape, b));
  }
  int64_t size() const { return sequences_ ? ends_[sequences_ - 1] : 0; }
  // The sequence of a task, and which of that sequence's it is.
  int64_t find(int64_t task, int64_t* index) const {
    const int64_t b = std::upper_bound(ends_, ends_ + sequences_, task) - ends_;
    *index = task - (b ? ends_[b - 1] : 0);
    return b;
  }

 private:
  Scratch memory_;
  int64_t sequences_;
  int64_t* ends_;
};

inline int64_t flops_of_product(const AttentionShape& shape) {
  int64_t scores = 0;
  for (int64_t b = 0; b < shape.B; ++b) scores += Sequence(shape, b).T * Sequence(shape, b).S;
  return 2 * shape.H * scores * shape.D;
}

// fp32 rows x D (row stride `width`), times `factor`, as T
template <class T>
void write_rows(const float* x, int64_t width, int64_t rows, int64_t D, float factor, T* out,
                int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for_each_vector(D, [&](int64_t d, auto part) {
      part.store(out + r * stride + d, part.load(x + r * width + d) * factor);
    });
}

// ---- Forward -------------------------------------------------------------------------------------

struct Forward {
  Heads q, k, v, o;
  float* lse;
  AttentionShape shape;
  AttentionOptions options;
};

template <class Unit>
struct QueryBlock {  // what a block of queries has gathered so far
  typename Unit::Operand q;
  Scratch o_t;  // Dv rows of Unit::kQueries lanes
  Softmax softmax;
};

// Queries [begin, end) of one head, at most Unit::kSharing blocks.
template <class Unit, class T>
void forward_blocks(const Forward& call, int64_t b, int64_t h, int64_t begin, int64_t end) {
  constexpr int64_t kQueries = Unit::kQueries;
  const AttentionShape& shape = call.shape;
  const Sequence sequence(shape, b);
  const int64_t D = shape.D, Dv = shape.Dv, h_kv = h / (shape.H / shape.H_kv);
  const Scores scores(call.options, sequence.T, sequence.S, b, h, shape.H);

  static thread_local QueryBlock<Unit> blocks[Unit::kSharing];
  static thread_local typename Unit::Operand k, v, p[Unit::kTogether];
  static thread_local Scratch tiles_scratch, rows_scratch;
  [[maybe_unused]] const typename Unit::Session session;

  const int64_t o_size = Unit::width(Dv) * kQueries;
  float* tiles = tiles_scratch.reserve(Unit::kTogether * kKeys * kQueries);
  float* o_rows = rows_scratch.reserve(o_size);
  for (int64_t query = begin; query < end; query += kQueries) {
    QueryBlock<Unit>& block = blocks[(query - begin) / kQueries];
    block.q.template pack<kRightTransposed>(row<const T>(call.q, b, h, sequence.first_q + query),
                                            call.q.stride_t, smaller(kQueries, end - query), D);
    block.softmax.clear();
    std::memset(block.o_t.reserve(o_size), 0, o_size * sizeof(float));
  }

  int64_t key = 0, keys_end = sequence.S;
  for (scores.band.blocks(begin, end, &key, &keys_end); key < keys_end; key += kKeys) {
    const int64_t keys = smaller(kKeys, keys_end - key), first_key = sequence.first_k + key;
    k.template pack<kLeft>(row<const T>(call.k, b, h_kv, first_key), call.k.stride_t, keys, D);
    v.template pack<kLeftTransposed>(row<const T>(call.v, b, h_kv, first_key), call.v.stride_t,
                                     keys, Dv);
    const auto tile_at = [&](int64_t i) {
      const int64_t query = begin + i * kQueries;
      return TileShape{query, smaller(kQueries, end - query), key, keys, kQueries};
    };
    // Those of the blocks that see any of these keys follow each other.
    int64_t first = 0, last = (end - begin + kQueries - 1) / kQueries;
    while (first < last && !scores.band.touches(tile_at(first))) ++first;
    while (first < last && !scores.band.touches(tile_at(last - 1))) --last;
    for (; first < last; first += Unit::kTogether) {
      const int64_t together = smaller(Unit::kTogether, last - first);
      for (int64_t i = 0; i < together; ++i)
        Unit::multiply(keys, tile_at(first + i).queries, D, k.left(),
                       blocks[first + i].q.right_transposed(), tiles + i * kKeys * kQueries,
                       kQueries, false);
      for (int64_t i = 0; i < together; ++i) {
        const TileShape at = tile_at(first + i);
        float* tile = tiles + i * kKeys * kQueries;
        QueryBlock<Unit>& block = blocks[first + i];
        const float factor = scores.finish(tile, at, nullptr);
        const bool moved =
            scores.dropout.active()
                ? block.softmax.template add<true>(tile, at, factor, scores.dropout, p[i])
                : block.softmax.template add<false>(tile, at, factor, scores.dropout, p[i]);
        if (moved) block.softmax.apply_rescale(block.o_t.reserve(o_size), Dv, at);
      }
      for (int64_t i = 0; i < together; ++i)
        Unit::multiply(Dv, tile_at(first + i).queries, keys, v.left_transposed(), p[i].right(),
                       blocks[first + i].o_t.reserve(o_size), kQueries, true);
    }
  }

  for (int64_t query = begin; query < end; query += kQueries) {
    QueryBlock<Unit>& block = blocks[(query - begin) / kQueries];
    const int64_t queries = smaller(kQueries, end - query), width = Unit::width(Dv);
    transpose(block.o_t.reserve(o_size), kQueries, width, ceil_to(queries, W), o_rows, width);
    const int64_t first = sequence.first_q + query;
    for (int64_t m = 0; m < queries; ++m) {
      const float sum = block.softmax.sum[m];
      write_rows(o_rows + m * width, width, 1, Dv, sum == 0 ? 0.0f : 1.0f / sum,
                 row<T>(call.o, b, h, first + m), call.o.stride_t);
      call.lse[lse_index(shape, b, h, first + m)] =
          sum == 0 ? -INFINITY : block.softmax.top[m] * kLn2 + std::log(sum);
    }
  }
}

// One query against all keys, for decoding: scores lie along the keys, and keys and values are read
// as they are, once. A tile would leave all but one of its lanes unused.
template <class T>
void forward_query(const Forward& call, int64_t b, int64_t h, int64_t query) {
  const AttentionShape& shape = call.shape;
  const Sequence sequence(shape, b);
  const int64_t D = shape.D, h_kv = h / (shape.H / shape.H_kv);
  const Scores scores(call.options, sequence.T, sequence.S, b, h, shape.H);
  const int64_t begin = scores.band.begin(query), keys = scores.band.end(query) - begin;
  const int64_t first_q = sequence.first_q + query, first_k = sequence.first_k + begin;

  static thread_local Scratch q_scratch, p_scratch;
  float* q_row = q_scratch.reserve(ceil_to(D, W));
  float* p = p_scratch.reserve(larger(keys, 0));
  const T* q_given = row<const T>(call.q, b, h, first_q);
  for_each_vector(D, [&](int64_t d, auto part) { store(q_row + d, part.load(q_given + d)); });

  for (int64_t n = 0; n < keys; ++n) {
    const T* k_row = row<const T>(call.k, b, h_kv, first_k + n);
    f32v dot{};
    for_each_vector(D,
                    [&](int64_t d, auto part) { dot += part.load(k_row + d) * load(q_row + d); });
    p[n] = reduce_add(dot);
  }
  const float diagonal = static_cast<float>(query + scores.band.diagonal() - begin);
  f32v top = set1(-FLT_MAX), sum{};
  for_each_vector(keys, [&](int64_t n, auto part) {
    const f32v distance = static_cast<float>(n) - diagonal + lane_numbers();
    const f32v s = scores.of(part.load(p + n), distance);
    part.store(p + n, s);
    top = max(part.live(s, set1(-FLT_MAX)), top);
  });
  const float highest = reduce_max(top);
  for_each_vector(keys, [&](int64_t n, auto part) {
    const f32v prob = part.live(exp2(part.load(p + n) - highest), f32v{});
    sum += prob;
    part.store(p + n, prob);
  });
  const float total = reduce_add(sum), scale = total == 0 ? 0.0f : 1.0f / total;
  T* out = row<T>(call.o, b, h, first_q);
  for_each_vector(shape.Dv, [&](int64_t d, auto part) {
    f32v acc[4] = {};  // four sums, to hide the latency of the addition
    const T* v_row = row<const T>(call.v, b, h_kv, first_k) + d;
    int64_t n = 0;
    for (; n + 4 <= keys; n += 4)
      for (int64_t i = 0; i < 4; ++i)
        acc[i] += p[n + i] * part.load(v_row + (n + i) * call.v.stride_t);
    for (; n < keys; ++n) acc[0] += p[n] * part.load(v_row + n * call.v.stride_t);
    part.store(out + d, (acc[0] + acc[1] + (acc[2] + acc[3])) * scale);
  });
  call.lse[lse_index(shape, b, h, first_q)] =
      total == 0 ? -INFINITY : highest * kLn2 + std::log(total);
}

// Calls body with two flags as compile-time constants.
template <class Body>
inline void with_flags(bool first, bool second, const Body& body) {
  auto with_second = [&](auto known) {
    second ? body(known, std::true_type{}) : body(known, std::false_type{});
  };
  first ? with_second(std::true_type{}) : with_second(std::false_type{});
}

// ---- Backward ------------------------------------------------------------------------------------

struct Backward {
  Heads dout, q, k, v, o;
  const float *lse, *dlse;
  Heads dq, dk, dv;
  AttentionShape shape;
  AttentionOptions options;
};

struct Range {
  int64_t begin, end;
};

// What the scores of some query heads that share a key head, of some queries and some keys give to
// the gradients: to dq, which is complete where `keys` are all, and to dk and dv, which are complete
// where `heads` and `queries` are all. keys.begin is a multiple of kChunk.
template <class Unit, class T>
void backward_part(const Backward& call, int64_t b, Range heads, Range queries, Range keys,
                   bool want_dq, bool want_dkv) {
  using Operand = typename Unit::Operand;
  constexpr int64_t kQueries = Unit::kBackwardQueries;
  const AttentionShape& shape = call.shape;
  const Sequence sequence(shape, b);
  const int64_t D = shape.D, Dv = shape.Dv, h_kv = heads.begin / (shape.H / shape.H_kv);
  const int64_t width = Unit::width(D), width_v = Unit::width(Dv);

  static thread_local Operand k[kChunk / kKeys], v[kChunk / kKeys], q, dout, p, ds;
  static thread_local Scratch dk_scratch, dv_scratch, dq_scratch, dq_t_scratch, rows_scratch;
  static thread_local Scratch p_scratch, ds_scratch, damping_scratch;
  alignas(64) float lse[kQueries], delta[kQueries];
  [[maybe_unused]] const typename Unit::Session session;

  const int64_t dq_rows = queries.end - queries.begin;
  const int64_t dq_size = want_dq ? (heads.end - heads.begin) * dq_rows * width : 0;
  float* dq = dq_scratch.reserve(dq_size);
  float* dq_t = dq_t_scratch.reserve(width * kQueries);
  float* rows = rows_scratch.reserve(width * kQueries);
  float* dk = dk_scratch.reserve(kChunk * width);
  float* dv = dv_scratch.reserve(kChunk * width_v);
  float* p_tile = p_scratch.reserve(kKeys * kQueries);
  float* ds_tile = ds_scratch.reserve(kKeys * kQueries);
  const bool softcap = call.options.softcap != 0;
  float* damping = softcap ? damping_scratch.reserve(kKeys * kQueries) : nullptr;
  std::memset(dq, 0, dq_size * sizeof(float));
  const Band band(call.options, sequence.T, sequence.S);

  for (int64_t chunk = keys.begin; chunk < keys.end; chunk += kChunk) {
    const int64_t chunk_end = smaller(chunk + kChunk, keys.end);
    std::memset(dk, 0, want_dkv ? kChunk * width * sizeof(float) : 0);
    std::memset(dv, 0, want_dkv ? kChunk * width_v * sizeof(float) : 0);

    int64_t first = chunk, last = chunk_end;
    if (queries.begin < queries.end)
      band.blocks(queries.begin, queries.end, &first, &last);
    else
      last = first;
    for (int64_t key = first; key < last; key += kKeys) {
      const int64_t i = (key - chunk) / kKeys, n = smaller(kKeys, chunk_end - key);
      const int64_t at = sequence.first_k + key;
      k[i].template pack<kLeft | kLeftTransposed>(row<const T>(call.k, b, h_kv, at),
                                                  call.k.stride_t, n, D);
      v[i].template pack<kLeft>(row<const T>(call.v, b, h_kv, at), call.v.stride_t, n, Dv);
    }

    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const Scores scores(call.options, sequence.T, sequence.S, b, h, shape.H);
      for (int64_t query = queries.begin; query < queries.end; query += kQueries) {
        const int64_t n_queries = smaller(kQueries, queries.end - query);
        int64_t key = chunk, keys_end = chunk_end;
        band.blocks(query, query + n_queries, &key, &keys_end);
        if (key >= keys_end) continue;

        const int64_t first_q = sequence.first_q + query;
        q.template pack<kRight | kRightTransposed>(row<const T>(call.q, b, h, first_q),
                                                   call.q.stride_t, n_queries, D);
        dout.template pack<kRight | kRightTransposed>(row<const T>(call.dout, b, h, first_q),
                                                      call.dout.stride_t, n_queries, Dv);
        for (int64_t m = 0; m < kQueries; ++m) {
          // A row that saw no key, or a lane past the end: 2^(s - inf) = 0.
          lse[m] = INFINITY, delta[m] = 0;
          if (m >= n_queries) continue;
          const int64_t at = lse_index(shape, b, h, first_q + m);
          if (call.lse[at] != -INFINITY) lse[m] = call.lse[at] * kLog2E;
          const T* o_row = row<const T>(call.o, b, h, first_q + m);
          const T* do_row = row<const T>(call.dout, b, h, first_q + m);
          f32v dot{};
          for_each_vector(Dv, [&](int64_t d, auto part) {
            dot += part.load(o_row + d) * part.load(do_row + d);
          });
          delta[m] = reduce_add(dot) - (call.dlse ? call.dlse[at] : 0.0f);
        }

        bool started = false;
        for (; key < keys_end; key += kKeys) {
          const int64_t i = (key - chunk) / kKeys;
          const TileShape at{query, n_queries, key, smaller(kKeys, chunk_end - key), kQueries};
          Unit::multiply(at.keys, at.queries, D, k[i].left(), q.right_transposed(), p_tile,
                         kQueries, false);
          Unit::multiply(at.keys, at.queries, Dv, v[i].left(), dout.right_transposed(), ds_tile,
                         kQueries, false);
          const float factor = scores.finish(p_tile, at, damping);
          with_flags(scores.dropout.active(), softcap, [&](auto dropped, auto damped) {
            score_gradients<dropped.value, damped.value>(p_tile, ds_tile, at, factor, lse, delta,
                                                         damping, scores.dropout);
          });
          ds.template pack_tile<kLeft | kRight>(ds_tile, kQueries, at.keys, at.queries);
          if (want_dq)
            Unit::multiply(D, at.queries, at.keys, k[i].left_transposed(), ds.right(), dq_t,
                           kQueries, started);
          started = true;
          if (want_dkv) {
            p.template pack_tile<kLeft>(p_tile, kQueries, at.keys, at.queries);
            Unit::multiply(at.keys, Dv, at.queries, p.left(), dout.right(),
                           dv + (key - chunk) * width_v, width_v, true);
            Unit::multiply(at.keys, D, at.queries, ds.left(), q.right(), dk + (key - chunk) * width,
                           width, true);
          }
        }
        if (want_dq) {
          transpose(dq_t, kQueries, width, ceil_to(n_queries, W), rows, width);
          float* sum = dq + ((h - heads.begin) * dq_rows + query - queries.begin) * width;
          for (int64_t i = 0; i < n_queries * width; i += W)
            store(sum + i, load(sum + i) + load(rows + i));
        }
      }
    }
    if (want_dkv) {
      const int64_t n = chunk_end - chunk, at = sequence.first_k + chunk;
      write_rows(dk, width, n, D, call.options.scale, row<T>(call.dk, b, h_kv, at),
                 call.dk.stride_t);
      write_rows(dv, width_v, n, Dv, 1.0f, row<T>(call.dv, b, h_kv, at), call.dv.stride_t);
    }
  }
  if (want_dq)
    for (int64_t h = heads.begin; h < heads.end; ++h)
      write_rows(dq + (h - heads.begin) * dq_rows * width, width, dq_rows, D, call.options.scale,
                 row<T>(call.dq, b, h, sequence.first_q + queries.begin), call.dq.stride_t);
}

// ---- Tasks ---------------------------------------------------------------------------------------

// Calls body(Unit{}, T{}) with the unit that multiplies numbers of type T.
template <class Body>
void with_unit(DType dtype, const Body& body) {
  with_dtype(dtype, [&](auto t) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<decltype(t), bf16>)
      body(TileUnit{}, t);
    else
#endif
      body(VectorUnit{}, t);
  });
}

inline int64_t blocks_in(int64_t n, int64_t block) { return (n + block - 1) / block; }

void attention_fwd(Heads q, Heads k, Heads v, Heads o, float* lse, AttentionShape shape,
                   AttentionOptions options, DType dtype) {
  const Forward call{q, k, v, o, lse, shape, options};
  const int64_t flops = 2 * flops_of_product(shape);
  with_unit(dtype, [&](auto unit, auto t) {
    using Unit = decltype(unit);
    using T = decltype(t);
    if (shape.T <= kFewQueries && options.dropout_threshold == 65536) {
      const Tasks tasks(shape, [&](const Sequence& s) { return shape.H * s.T; });
      parallel_for_dynamic(tasks.size(), flops, [&](int64_t task) {
        int64_t index, b = tasks.find(task, &index);
        const int64_t queries = Sequence(shape, b).T;
        forward_query<T>(call, b, index / queries, index % queries);
      });
      return;
    }
    const Tasks blocks(shape,
                       [&](const Sequence& s) { return shape.H * blocks_in(s.T, Unit::kQueries); });
    // Eight tasks a thread level out that causal ones differ in length; one thread needs no more
    // than there must be.
    const int64_t threads = omp_get_max_threads(), wanted = threads == 1 ? 1 : 8 * threads;
    const int64_t sharing = smaller(larger(blocks.size() / wanted, 1), Unit::kSharing);
    const int64_t n = sharing * Unit::kQueries;
    const Tasks tasks(shape, [&](const Sequence& s) { return shape.H * blocks_in(s.T, n); });
    parallel_for_dynamic(tasks.size(), flops, [&](int64_t task) {
      int64_t index, b = tasks.find(task, &index);
      const int64_t queries = Sequence(shape, b).T, per_head = blocks_in(queries, n);
      // the longest causal rows first
      const int64_t begin = (per_head - 1 - index % per_head) * n;
      forward_blocks<Unit, T>(call, b, index / per_head, begin, smaller(begin + n, queries));
    });
  });
}

void attention_bwd(Heads dout, Heads q, Heads k, Heads v, Heads o, const float* lse,
                   const float* dlse, Heads dq, Heads dk, Heads dv, AttentionShape shape,
                   AttentionOptions options, DType dtype) {
  const Backward call{dout, q, k, v, o, lse, dlse, dq, dk, dv, shape, options};
  const bool want_dq = dq.address, want_dkv = dk.address;
  const int64_t group = shape.H / shape.H_kv, heads = shape.B * shape.H_kv;
  const int64_t flops = 5 * flops_of_product(shape), threads = omp_get_max_threads();
  auto heads_of = [&](int64_t h_kv) { return Range{h_kv * group, (h_kv + 1) * group}; };
  with_unit(dtype, [&](auto unit, auto t) {
    using Unit = decltype(unit);
    using T = decltype(t);
    // Rounds of whole heads for every thread, with 5 products a tile, or an even share of 7.
    if (want_dq && want_dkv && 5 * blocks_in(heads, threads) * threads <= 7 * heads) {
      parallel_for_dynamic(heads, flops, [&](int64_t task) {
        const int64_t b = task / shape.H_kv;
        const Sequence sequence(shape, b);
        backward_part<Unit, T>(call, b, heads_of(task % shape.H_kv), {0, sequence.T},
                               {0, sequence.S}, true, true);
      });
      return;
    }
    if (want_dkv) {
      const Tasks tasks(shape,
                        [&](const Sequence& s) { return shape.H_kv * blocks_in(s.S, kChunk); });
      parallel_for_dynamic(tasks.size(), flops, [&](int64_t task) {
        int64_t index, b = tasks.find(task, &index);
        const Sequence sequence(shape, b);
        const int64_t chunks = blocks_in(sequence.S, kChunk), chunk = index % chunks * kChunk;
        backward_part<Unit, T>(call, b, heads_of(index / chunks), {0, sequence.T},
                               {chunk, smaller(chunk + kChunk, sequence.S)}, false, true);
      });
    }
    if (want_dq) {
      const Tasks blocks(shape, [&](const Sequence& s) {
        return shape.H * blocks_in(s.T, Unit::kBackwardQueries);
      });
      const bool share = blocks.size() >= 2 * kBackwardSharing * threads;
      const int64_t n = share ? kBackwardSharing * Unit::kBackwardQueries : Unit::kBackwardQueries;
      const Tasks tasks(shape, [&](const Sequence& s) { return shape.H * blocks_in(s.T, n); });
      parallel_for_dynamic(tasks.size(), flops, [&](int64_t task) {
        int64_t index, b = tasks.find(task, &index);
        const Sequence sequence(shape, b);
        const int64_t per_head = blocks_in(sequence.T, n), h = index / per_head;
        const int64_t begin = (per_head - 1 - index % per_head) * n;
        backward_part<Unit, T>(call, b, {h, h + 1}, {begin, smaller(begin + n, sequence.T)},
                               {0, sequence.S}, true, false);
      });
    }
  });
}

void attention_dropout_mask(uint8_t* keep, int64_t head, int64_t T, int64_t S, int64_t threshold,
                            int64_t seed) {
  AttentionOptions options{};
  options.dropout_threshold = threshold;
  options.seed = seed;
  const Dropout dropout(options, head);
  for (int64_t i = 0; i < T; i += W)
    for (int64_t j = 0; j < S; j += 8) {
      f32v z[8];
      dropout.factors(i, j, z);
      for (int64_t n = 0; n < 8 && j + n < S; ++n)
        for (int64_t m = 0; m < W && i + m < T; ++m) keep[(i + m) * S + j + n] = z[n][m] != 0;
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(attention_fwd)
REGISTER_KERNEL(attention_bwd)
REGISTER_KERNEL(attention_dropout_mask)

#ifdef GPTFAST_BASELINE
namespace gptfast {
template <>
struct FromPython<AttentionShape> {
  // B, H, H_kv, T, S, D, Dv, ends_q, ends_k, stride_lse_b, stride_lse_h
  using type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t,
                          uintptr_t, int64_t, int64_t>;
  static AttentionShape get(type t) {
    const auto [B, H, H_kv, T, S, D, Dv, ends_q, ends_k, stride_lse_b, stride_lse_h] = t;
    return {B,
            H,
            H_kv,
            T,
            S,
            D,
            Dv,
            reinterpret_cast<const int32_t*>(ends_q),
            reinterpret_cast<const int32_t*>(ends_k),
            stride_lse_b,
            stride_lse_h};
  }
};
}  // namespace gptfast
void register_attention(pybind11::module_& m) {
  gptfast::bind_kernel(m, "attention_fwd", gptfast::kernel_attention_fwd);
  gptfast::bind_kernel(m, "attention_bwd", gptfast::kernel_attention_bwd);
  gptfast::bind_kernel(m, "attention_dropout_mask", gptfast::kernel_attention_dropout_mask);
}
#endif
