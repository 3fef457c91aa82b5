// Attention of a few new tokens to a cache of keys and values, contiguous or paged, and the appending
// to it. gptfast/ops/attention_decode.py has the maths.
//
// The T queries of all heads that share a key head are rows of one problem: keys and values are read
// once for all of them. A task has a key head, a block of rows, and a part of at most kPart keys, and
// leaves an unnormalised o, its maximum and its sum for each row; in the end these merge in order.
// How keys are split does not depend on the threads, and so neither do the bits.
//
// Up to four rows are handled one by one, with the scores along the keys: a tile would leave most of
// its lanes unused. Where the heads of a key lie next to each other, a task has several of them, so
// that memory is read in order. More rows are the lanes of attention's tiles (attention_products.h).
#include <algorithm>
#include <type_traits>

#include "attention_products.h"
#include "attention_scores.h"
#include "heads.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace gptfast {

struct CacheShape {
  int64_t B, H, H_kv, T, D, Dv;
  const int32_t* lengths;  // (B,), keys of each sequence
  // Key j of sequence b is slot j % page_size of page table[b * max_pages + j / page_size]; without a
  // table, slot j of page b.
  const int32_t* table;
  int64_t max_pages, page_size;
};

}  // namespace gptfast

// A cache is Heads of pages: stride_b from page to page, stride_t from slot to slot.
// lse is (B, H, T) fp32. options: causal, without dropout.
DECLARE_KERNEL(attention_decode_fwd,
               void(Heads q, Heads k_cache, Heads v_cache, Heads o, float* lse, CacheShape shape,
                    AttentionOptions options, DType dtype))
// The last T keys of each sequence, as far as it has them, become x (B, H_kv, T, D), of which stride_d
// and cache_stride_d are the strides of D.
DECLARE_KERNEL(kv_cache_append, void(Heads x, int64_t stride_d, Heads cache, int64_t cache_stride_d,
                                     CacheShape shape, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kPart = 256;  // keys: some 5 us of reading at D = 64, the price of a fork
constexpr int64_t kFewRows = 4;
constexpr int64_t kHeads = 16;      // their scores of a part, kFewRows each, are 64 KB
constexpr int64_t kKeysAtOnce = 4;  // that share a load of q, or of o
static_assert(kKeysAtOnce == 4 && kPart % kKeysAtOnce == 0);  // as reduce_add_4 writes into p
constexpr int64_t kGrainBytes = 65536;                        // copied by a thread: some 5 us

struct Place {
  int64_t page, slot;
};
inline Place place_of(const CacheShape& shape, int64_t b, int64_t key) {
  if (!shape.table) return {b, key};
  return {shape.table[b * shape.max_pages + key / shape.page_size], key % shape.page_size};
}

struct Decode {
  Heads q, k, v, o;
  float* lse;
  CacheShape shape;
  AttentionOptions options;
  int64_t parts;                 // room for so many of each sequence
  float *sums, *tops, *o_parts;  // (B, H_kv, parts, rows), and for o with Dv behind them

  int64_t group() const { return shape.H / shape.H_kv; }
  int64_t rows() const { return group() * shape.T; }
  // Row m belongs to query m % T of head m / T of the group.
  int64_t head(int64_t h_kv, int64_t m) const { return h_kv * group() + m / shape.T; }
  int64_t index(int64_t b, int64_t h_kv, int64_t part, int64_t m) const {
    return ((b * shape.H_kv + h_kv) * parts + part) * rows() + m;
  }
  Band band(int64_t b) const { return Band(options, shape.T, shape.lengths[b]); }
};

// What a task has to do: rows [row, row_end) of some key heads and keys [key, key_end) of sequence b.
struct Task {
  int64_t b, h_kv, h_kv_end, part, row, row_end, key, key_end;
};

// Calls body(n, x) with each key n of a task, counted from its first, and its row of a cache.
template <class T, class Body>
inline void for_each_row(const Decode& call, const Task& task, Heads cache, const Body& body) {
  for (int64_t key = task.key; key < task.key_end;) {
    const Place at = place_of(call.shape, task.b, key);
    const int64_t end = smaller(task.key_end, key + call.shape.page_size - at.slot);
    const T* x = row<const T>(cache, at.page, task.h_kv, at.slot);
    for (; key < end; ++key, x += cache.stride_t) body(key - task.key, x);
  }
}

// Calls body(n, count) with every kKeysAtOnce of n keys, and with the rest: count is a constant but for
// those.
template <class Body>
inline void for_keys_at_once(int64_t keys, const Body& body) {
  int64_t n = 0;
  for (; n + kKeysAtOnce <= keys; n += kKeysAtOnce)
    body(n, std::integral_constant<int64_t, kKeysAtOnce>{});
  if (n < keys) body(n, keys - n);
}

// At most kFewRows rows of some heads, one by one: first all scores, key after key and head after head,
// then the softmax of each row, then the sums of values in the same order as the scores.
template <class T>
void visit_rows(const Decode& call, const Task& task) {
  const CacheShape& shape = call.shape;
  const int64_t D = shape.D, Dv = shape.Dv, width = ceil_to(D, W), keys = task.key_end - task.key;
  const int64_t rows = call.rows(), heads = task.h_kv_end - task.h_kv;
  static thread_local Scratch q_scratch, p_scratch, rows_scratch;
  float* q = q_scratch.reserve(heads * rows * width);
  float* p = p_scratch.reserve(heads * rows * kPart);
  const T** cached = rows_scratch.reserve<const T*>(kPart);  // each key, then each value

  for (int64_t i = 0; i < heads * rows; ++i) {
    const int64_t m = i % rows, h = call.head(task.h_kv + i / rows, m);
    const T* from = row<const T>(call.q, task.b, h, m % shape.T);
    for_each_vector(D,
                    [&](int64_t d, auto part) { store(q + i * width + d, part.load(from + d)); });
  }
  for_each_row<T>(call, task, call.k, [&](int64_t n, const T* k) { cached[n] = k; });
  for_keys_at_once(keys, [&](int64_t n, auto count) {
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t j = i * rows; j < (i + 1) * rows; ++j) {
        f32v dots[kKeysAtOnce]{};
        for_each_vector(D, [&](int64_t d, auto part) {
          const f32v q_part = load(q + j * width + d);
          for (int64_t m = 0; m < count; ++m)
            dots[m] += part.load(cached[n + m] + i * call.k.stride_h + d) * q_part;
        });
        reduce_add_4(dots, p + j * kPart + n);
      }
  });

  const Band band = call.band(task.b);
  for (int64_t i = 0; i < heads * rows; ++i) {
    const int64_t h_kv = task.h_kv + i / rows, m = i % rows, query = m % shape.T;
    const Scores scores(call.options, shape.T, shape.lengths[task.b], task.b, call.head(h_kv, m),
                        shape.H);
    float* seen = p + i * kPart;  // where [begin, end) are seen
    const int64_t begin = smaller(keys, larger(0, band.begin(query) - task.key));
    const int64_t end = larger(begin, smaller(keys, band.end(query) - task.key));
    const float diagonal = static_cast<float>(query + band.diagonal() - task.key);
    f32v top = set1(-FLT_MAX), sum{};
    for_each_vector(end - begin, [&](int64_t n, auto part) {
      const f32v distance = static_cast<float>(begin + n) - diagonal + lane_numbers();
      const f32v s = scores.of(part.load(seen + begin + n), distance);
      part.store(seen + begin + n, s);
      top = max(part.live(s, set1(-FLT_MAX)), top);
    });
    const float highest = reduce_max(top);
    for_each_vector(end - begin, [&](int64_t n, auto part) {
      const f32v prob = part.live(exp2(part.load(seen + begin + n) - highest), f32v{});
      sum += prob;
      part.store(seen + begin + n, prob);
    });
    std::fill(seen, seen + begin, 0.0f);
    std::fill(seen + end, seen + keys, 0.0f);
    const int64_t index = call.index(task.b, h_kv, task.part, m);
    call.tops[index] = highest;
    call.sums[index] = reduce_add(sum);
    std::memset(call.o_parts + index * Dv, 0, Dv * sizeof(float));
  }

  for_each_row<T>(call, task, call.v, [&](int64_t n, const T* v) { cached[n] = v; });
  const int64_t o_stride = call.index(0, 1, 0, 0) * Dv;  // from head to head
  float* o_first = call.o_parts + call.index(task.b, task.h_kv, task.part, 0) * Dv;
  for_keys_at_once(keys, [&](int64_t n, auto count) {
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t r = 0; r < rows; ++r) {
        float weight[kKeysAtOnce];
        std::memcpy(weight, p + (i * rows + r) * kPart + n, sizeof weight);
        float* o = o_first + i * o_stride + r * Dv;
        for_each_vector(Dv, [&](int64_t d, auto part) {
          f32v acc = part.load(o + d);
          for (int64_t m = 0; m < count; ++m)
            acc += weight[m] * part.load(cached[n + m] + i * call.v.stride_h + d);
          part.store(o + d, acc);
        });
      }
  });
}

// Keys [key, key + n) of a cache, n rows of D with one stride: copied where they lie in several pages.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;

  KeyRows(const Decode& call, Heads cache, const Task& task, int64_t key, int64_t n, int64_t D,
          Scratch& scratch) {
    const Place at = place_of(call.shape, task.b, key);
    data = row<const T>(cache, at.page, task.h_kv, at.slot);
    stride = cache.stride_t;
    if (at.slot + n <= call.shape.page_size) return;
    T* copy = scratch.reserve<T>(kKeys * D);
    const Task part{task.b, task.h_kv, task.h_kv_end, 0, 0, 0, key, key + n};
    for_each_row<T>(call, part, cache,
                    [&](int64_t i, const T* x) { std::memcpy(copy + i * D, x, D * sizeof(T)); });
    data = copy;
    stride = D;
  }
};

// tile: q . k, which becomes the score, -inf where it is masked, up to the factor that is returned.
// diagonal: the key of each row, counted from the tile's first, that is its own.
float finish_rows(float* tile, const TileShape& at, const Scores& scores, const Decode& call,
                  bool covered, const int32_t* diagonal, const float* slopes) {
  if (covered && !scores.has_softcap() && !call.options.slopes && call.options.scale >= 0)
    return call.options.scale * kLog2E;
  const int64_t left = call.options.left;
  const int32_t span = left < 0 ? INT32_MAX : static_cast<int32_t>(smaller(left, INT32_MAX));
  for (int64_t m = 0; m < at.lanes(); m += W) {
    i32v own;
    std::memcpy(&own, diagonal + m, sizeof own);
    for (int64_t n = 0; n < at.keys; ++n) {
      float* score = tile + n * at.stride + m;
      const i32v behind =
          own - static_cast<int32_t>(n);  // how far the key lies before the row's own
      f32v s = scores.capped(load(score));
      if (call.options.slopes) s -= load(slopes + m) * abs(__builtin_convertvector(behind, f32v));
      s = select((behind >= 0) & (behind <= span), s * kLog2E, set1(-INFINITY));
      store(score, s);
    }
  }
  return 1.0f;
}

// Any rows, Unit::kQueries at most, as the lanes of score tiles.
template <class Unit, class T>
void visit_tiles(const Decode& call, const Task& task) {
  constexpr int64_t kLanes = Unit::kQueries;
  const CacheShape& shape = call.shape;
  const int64_t D = shape.D, Dv = shape.Dv, rows = task.row_end - task.row;
  const int64_t length = shape.lengths[task.b], width = Unit::width(Dv), o_size = width * kLanes;
  static thread_local typename Unit::Operand q, k, v, p;
  static thread_local Scratch q_scratch, k_scratch, v_scratch, tile_scratch, o_t_scratch, o_scratch;
  [[maybe_unused]] const typename Unit::Session session;
  T* q_rows = q_scratch.reserve<T>(kLanes * D);
  float* tile = tile_scratch.reserve(kKeys * kLanes);
  float* o_t = o_t_scratch.reserve(o_size);
  float* o_rows = o_scratch.reserve(o_size);
  alignas(64) int32_t diagonal[kMostQueries] = {};
  alignas(64) float slopes[kMostQueries] = {};

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = task.row + r, h = call.head(task.h_kv, m);
    std::memcpy(q_rows + r * D, row<const T>(call.q, task.b, h, m % shape.T), D * sizeof(T));
    if (call.options.slopes)
      slopes[r] =
          call.options
              .slopes[task.b * call.options.stride_slopes_b + h * call.options.stride_slopes_h];
  }
  q.template pack<kRightTransposed>(q_rows, D, rows, D);
  Softmax softmax;
  softmax.clear();
  std::memset(o_t, 0, o_size * sizeof(float));

  const Scores scores(call.options, shape.T, length, task.b, 0, shape.H);  // of no head's slope
  for (int64_t key = task.key; key < task.key_end; key += kKeys) {
    const int64_t keys = smaller(kKeys, task.key_end - key);
    const KeyRows<T> k_rows(call, call.k, task, key, keys, D, k_scratch);
    const KeyRows<T> v_rows(call, call.v, task, key, keys, Dv, v_scratch);
    k.template pack<kLeft>(k_rows.data, k_rows.stride, keys, D);
    v.template pack<kLeftTransposed>(v_rows.data, v_rows.stride, keys, Dv);
    const TileShape at{task.row, rows, key, keys, kLanes};
    Unit::multiply(keys, rows, D, k.left(), q.right_transposed(), tile, kLanes, false);
    const bool covered = scores.band.begin(shape.T - 1) <= key && key + keys <= scores.band.end(0);
    for (int64_t r = 0; r < rows; ++r)
      diagonal[r] = static_cast<int32_t>((task.row + r) % shape.T + length - shape.T - key);
    const float factor = finish_rows(tile, at, scores, call, covered, diagonal, slopes);
    if (softmax.template add<false>(tile, at, factor, scores.dropout, p))
      softmax.apply_rescale(o_t, Dv, at);
    Unit::multiply(Dv, rows, keys, v.left_transposed(), p.right(), o_t, kLanes, true);
  }

  transpose(o_t, kLanes, width, ceil_to(rows, W), o_rows, width);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = call.index(task.b, task.h_kv, task.part, task.row + r);
    call.tops[index] = softmax.top[r];
    call.sums[index] = softmax.sum[r];
    std::memcpy(call.o_parts + index * Dv, o_rows + r * width, Dv * sizeof(float));
  }
}

// o and lse of one row from its parts.
template <class T>
void merge(const Decode& call, int64_t b, int64_t h_kv, int64_t m, int64_t parts) {
  const CacheShape& shape = call.shape;
  static thread_local Scratch scratch;
  float* weight = scratch.reserve(parts);
  float top = -FLT_MAX, sum = 0;
  for (int64_t part = 0; part < parts; ++part)
    top = std::max(top, call.tops[call.index(b, h_kv, part, m)]);
  for (int64_t part = 0; part < parts; ++part) {
    weight[part] = exp2(set1(call.tops[call.index(b, h_kv, part, m)] - top))[0];
    sum += weight[part] * call.sums[call.index(b, h_kv, part, m)];
  }
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
  const int64_t h = call.head(h_kv, m), t = m % shape.T;
  T* out = row<T>(call.o, b, h, t);
  for_each_vector(shape.Dv, [&](int64_t d, auto vector) {
    f32v total{};
    for (int64_t part = 0; part < parts; ++part)
      total +=
          weight[part] * vector.load(call.o_parts + call.index(b, h_kv, part, m) * shape.Dv + d);
    vector.store(out + d, total * inverse);
  });
  call.lse[(b * shape.H + h) * shape.T + t] = sum == 0 ? -INFINITY : top * kLn2 + std::log(sum);
}

template <class Unit, class T>
void decode(Decode& call) {
  const CacheShape& shape = call.shape;
  // The keys that some query of a sequence sees begin at `first`.
  auto first = [&](int64_t b) { return call.band(b).begin(0); };
  auto parts_of = [&](int64_t b) { return (shape.lengths[b] - first(b) + kPart - 1) / kPart; };
  int64_t pairs = 0;
  for (int64_t b = 0; b < shape.B; ++b) {
    call.parts = std::max(call.parts, parts_of(b));
    pairs += shape.lengths[b] - first(b);
  }
  const int64_t rows = call.rows(), lines = shape.B * shape.H_kv * call.parts * rows;
  Scratch workspace;
  call.sums = workspace.reserve(lines * (2 + shape.Dv));
  call.tops = call.sums + lines;
  call.o_parts = call.tops + lines;

  const int64_t flops = 2 * pairs * shape.H * shape.T * (shape.D + shape.Dv);
  const bool few = rows <= kFewRows, adjacent = call.k.stride_h < call.k.stride_t;
  const int64_t together = few && adjacent ? smaller(kHeads, shape.H_kv) : 1;
  const int64_t head_groups = (shape.H_kv + together - 1) / together;
  const int64_t block = few ? kFewRows : Unit::kQueries, blocks = (rows + block - 1) / block;
  parallel_for_dynamic(shape.B * call.parts * head_groups * blocks, flops, [&](int64_t i) {
    const int64_t row = i % blocks * block, h_kv = i / blocks % head_groups * together;
    const int64_t b = i / blocks / head_groups / call.parts;
    const int64_t part = i / blocks / head_groups % call.parts;
    if (part >= parts_of(b)) return;
    const int64_t key = first(b) + part * kPart, end = smaller(key + kPart, shape.lengths[b]);
    const int64_t h_kv_end = smaller(h_kv + together, shape.H_kv);
    const Task task{b, h_kv, h_kv_end, part, row, smaller(row + block, rows), key, end};
    if (few)
      visit_rows<T>(call, task);
    else
      visit_tiles<Unit, T>(call, task);
  });
  parallel_for_dynamic(shape.B * shape.H_kv * rows, 2 * lines * shape.Dv, [&](int64_t i) {
    const int64_t b = i / rows / shape.H_kv;
    merge<T>(call, b, i / rows % shape.H_kv, i % rows, parts_of(b));
  });
}

void attention_decode_fwd(Heads q, Heads k_cache, Heads v_cache, Heads o, float* lse,
                          CacheShape shape, AttentionOptions options, DType dtype) {
  Decode call{q, k_cache, v_cache, o, lse, shape, options, 0, nullptr, nullptr, nullptr};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, bf16>)
      decode<TileUnit, T>(call);
    else
#endif
      decode<VectorUnit, T>(call);
  });
}

void kv_cache_append(Heads x, int64_t stride_d, Heads cache, int64_t cache_stride_d,
                     CacheShape shape, DType dtype) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t D = shape.D, bytes = shape.H_kv * D * static_cast<int64_t>(sizeof(T));
    parallel_for(shape.B * shape.T, kGrainBytes / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / shape.T, t = i % shape.T, key = shape.lengths[b] - shape.T + t;
        if (key < 0) continue;
        const Place at = place_of(shape, b, key);
        for (int64_t h = 0; h < shape.H_kv; ++h) {
          const T* from = row<const T>(x, b, h, t);
          T* to = row<T>(cache, at.page, h, at.slot);
          if (stride_d == 1 && cache_stride_d == 1)
            std::memcpy(to, from, D * sizeof(T));
          else
            for (int64_t d = 0; d < D; ++d) to[d * cache_stride_d] = from[d * stride_d];
        }
      }
    });
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(attention_decode_fwd)
REGISTER_KERNEL(kv_cache_append)

#ifdef GPTFAST_BASELINE
namespace gptfast {
template <>
struct FromPython<CacheShape> {
  // B, H, H_kv, T, D, Dv, lengths, table, max_pages, page_size
  using type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t,
                          uintptr_t, int64_t, int64_t>;
  static CacheShape get(type t) {
    const auto [B, H, H_kv, T, D, Dv, lengths, table, max_pages, page_size] = t;
    return {B,
            H,
            H_kv,
            T,
            D,
            Dv,
            reinterpret_cast<const int32_t*>(lengths),
            reinterpret_cast<const int32_t*>(table),
            max_pages,
            page_size};
  }
};
}  // namespace gptfast
void register_attention_decode(pybind11::module_& m) {
  gptfast::bind_kernel(m, "attention_decode_fwd", gptfast::kernel_attention_decode_fwd);
  gptfast::bind_kernel(m, "kv_cache_append", gptfast::kernel_kv_cache_append);
}
#endif
