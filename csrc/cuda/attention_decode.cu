// Attention of a few new tokens to a cache of keys and values. The maths stands in
// gptfast/ops/attention_decode.py, that of a tile in attention_tile.cuh.
//
// A block takes one part of the keys of one key head of one sequence, and 16 rows: pairs of a query
// and one of the heads that share the key head, packed, so that even a single query fills the matrix
// instruction. Its warps take the tiles of 16 keys in turns, each with an o and a sum of its own and
// two tiles of keys and values, one of which is on its way while the other is multiplied: no warp
// waits for another before the end, where the block merges what its warps found. Blocks of rows that
// read the same keys are neighbours, and so are the parts' blocks of the second kernel, which merges
// the parts of each row. With one part there is no second kernel.
//
// The newest keys and values may come from outside the caches. The block that has the last rows puts
// them there, each by the warp whose tile it is in; every block takes them from outside, so that none
// waits for another.
#include "attention_tile.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kKeys = 16;  // of a tile
// Their tiles, two of keys and two of values a warp, fit twice into 164 KiB.
template <int kD>
constexpr int kWarps = kD <= 128 ? 4 : 2;
constexpr int kMergedRows = 4;  // in a block of the second kernel

struct Shape {
  int B, H, group;  // query heads, and how many of them share a key head
  int T, S;         // queries, and tokens that a sequence has room for
  int D, Dv;
};

// Pages and slots of a sequence's tokens; without a table its page is the sequence itself.
struct Pages {
  const int* table;
  int max_pages, page_size;
};

// Columns `column` and the seven next of a row, token t of sequence b, turned by its angles.
template <class T>
__device__ __forceinline__ Pack<T, 8> load_turned(const T* row, int column, const NewTokens& fresh,
                                                  int b, int t) {
  auto pack = load<8>(row + column);
  if (!fresh.cos) return pack;
  const int half = fresh.half;
  const int64_t angles = b * fresh.stride_b + int64_t{t} * half;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const int d = column + c;
    if (d >= 2 * half) break;
    const bool second = fresh.interleaved ? d % 2 : d >= half;
    const int other = d + (second ? -1 : 1) * (fresh.interleaved ? 1 : half);
    const int64_t angle = angles + (fresh.interleaved ? d / 2 : d % half);
    const float cos = fresh.cos[angle], sin = second ? fresh.sin[angle] : -fresh.sin[angle];
    pack.set(c, pack[c] * cos + to_float(row[other]) * sin);
  }
  return pack;
}

template <class T, int kD>
struct Memory {
  T q[kRows * kPitch<kD>];
  union {
    T tiles[kWarps<kD>][2][2][kKeys * kPitch<kD>];  // of keys and of values, two of each
    float o[kWarps<kD>][kRows][kD + 4];             // of the warps; 4 keep rows in different banks
  };
  float top[kWarps<kD>][kRows], total[kWarps<kD>][kRows];
};

// o: (parts, B, T, H, Dv), fp32 if there are several parts. lse: (parts, B, H, T).
template <class T, int kD>
__global__ void __launch_bounds__(32 * kWarps<kD>, 1)
    attention_decode_kernel(Heads q, Heads k, Heads v, NewTokens fresh, const int* lengths,
                            Pages pages, Slopes slopes, void* o, float* lse, Shape shape,
                            float scale, int left, float softcap) {
  DYN_SMEM(bytes);
  auto& memory = *reinterpret_cast<Memory<T, kD>*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kThreads = 32 * kWarps<kD>, kPacks = kD / 8;

  const int row_blocks = ceil_div(shape.T * shape.group, kRows);
  const int key_heads = shape.H / shape.group;
  const int first = blockIdx.x % row_blocks * kRows;
  const int b = blockIdx.x / row_blocks / key_heads;
  const int h_kv = blockIdx.x / row_blocks % key_heads;
  const int part = blockIdx.y, parts = gridDim.y;
  const auto query_of = [&](int row) { return (first + row) / shape.group; };
  const auto head_of = [&](int row) { return h_kv * shape.group + (first + row) % shape.group; };

  // Keys that some row of the block sees, then this part of their tiles.
  const int length = min(max(lengths[b], 0), shape.S), diagonal = length - shape.T;
  const int high = max(min(query_of(kRows - 1), shape.T - 1) + diagonal + 1, 0);
  // The first token that is new, and whether this block puts new ones into the caches.
  const int first_new = fresh.k.data ? lengths[b] - shape.T : shape.S;
  const bool appends = fresh.k.data && first + kRows >= shape.T * shape.group;
  int low = min(max(query_of(0) + diagonal - left, 0), high);
  if (appends) low = min(low, max(first_new, 0));
  const int share = ceil_div(ceil_div(high - low, kKeys), parts) * kKeys;
  const int begin = min(low + part * share, high), end = min(begin + share, high);

  for (int pack = threadIdx.x; pack < kRows * kPacks; pack += kThreads) {
    const int row = pack / kPacks, column = pack % kPacks * 8;
    Pack<T, 8> values{};
    if (query_of(row) < shape.T && column < shape.D)
      values = load_turned(row_of<const T>(q, b, head_of(row), query_of(row)), column, fresh, b,
                           query_of(row));
    store(memory.q + row * kPitch<kD> + column, values);
  }
  __syncthreads();
  AttentionTile<T, kD> own(memory.q);

  // Starts copying the keys and values from `start` on; zeros stand for what is behind the end.
  const auto fetch = [&](int stage, int start) {
    const int token = min(start + lane % kKeys, shape.S - 1);
    int page = b, slot = token;  // of this lane's token
    if (pages.table && token < end) {
      page = pages.table[int64_t{b} * pages.max_pages + token / pages.page_size];
      slot = token % pages.page_size;
    }
    T* const key_tile = memory.tiles[warp][stage][0];
    T* const value_tile = memory.tiles[warp][stage][1];
    // Calls body(key, column, where in a tile, where in the caches) for one pack; a warp together.
    const auto with_pack = [&](int pack, const auto& body) {
      const int row = pack / kPacks, column = pack % kPacks * 8;
      const int row_page = __shfl_sync(kAllLanes, page, row);
      const int row_slot = __shfl_sync(kAllLanes, slot, row);
      body(start + row, column, row * kPitch<kD> + column,
           row_of<T>(k, row_page, h_kv, row_slot) + column,
           row_of<T>(v, row_page, h_kv, row_slot) + column);
    };
#pragma unroll 4
    for (int pack = lane; pack < kKeys * kPacks; pack += 32)
      with_pack(pack, [&](int key, int column, int at, const T* keys, const T* values) {
        if (key >= first_new && key < end) return;
        const bool has_key = key < end && column < shape.D;
        const bool has_value = key < end && column < shape.Dv;
        cp_async_16(key_tile + at, has_key ? keys : k.data, has_key);
        cp_async_16(value_tile + at, has_value ? values : v.data, has_value);
      });
    if (start + kKeys <= first_new) return;
#pragma unroll 1
    for (int pack = lane; pack < kKeys * kPacks; pack += 32)
      with_pack(pack, [&](int key, int column, int at, T* keys, T* values) {
        if (key < first_new || key >= end) return;
        const int t = key - first_new;
        Pack<T, 8> new_key{}, new_value{};
        if (column < shape.D) {
          new_key = load_turned(row_of<const T>(fresh.k, b, h_kv, t), column, fresh, b, t);
          if (appends) store(keys, new_key);
        }
        if (column < shape.Dv) {
          new_value = load<8>(row_of<const T>(fresh.v, b, h_kv, t) + column);
          if (appends) store(values, new_value);
        }
        store(key_tile + at, new_key);
        store(value_tile + at, new_value);
      });
  };

  int query[2];  // of this lane's rows g and g + 8
  float slope[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    query[half] = query_of(row);
    if (slopes.data && query[half] < shape.T)
      slope[half] = slopes.data[b * slopes.stride_b + head_of(row)];
  }
  constexpr int kStep = kKeys * kWarps<kD>;
  int stage = 0, start = begin + kKeys * warp;
  if (start < end) fetch(0, start);
  cp_async_commit();
  for (; start < end; start += kStep, stage ^= 1) {
    if (start + kStep < end) fetch(stage ^ 1, start + kStep);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();  // this tile is there
    float s[kKeys / 8][4];
    own.template scores<kKeys>(memory.tiles[warp][stage][0], s);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = start + 8 * n + 2 * (lane % 4) + j % 2;
        const int distance = key - (query[j / 2] + diagonal);
        float& x = s[n][j];
        x *= scale;
        if (softcap != 0.0f) x = softcap * tanhf(x / softcap);
        x = (x + slope[j / 2] * distance) * kLog2E;
        if (key >= end || distance > 0 || distance < -left) x = -INFINITY;
      }
    own.softmax(s);
    own.add_values(s, memory.tiles[warp][stage][1]);
    __syncwarp();  // nobody reads this tile any more
  }
  cp_async_wait<0>();
  own.sum_totals();
  __syncthreads();  // nobody reads any tile any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      Pack<float, 2> pair;
      pair.value[0] = own.o[n][2 * half], pair.value[1] = own.o[n][2 * half + 1];
      store(&memory.o[warp][row][8 * n + 2 * (lane % 4)], pair);
    }
    if (lane % 4 == 0) {
      memory.top[warp][row] = own.top[half];
      memory.total[warp][row] = own.total[half];
    }
  }
  __syncthreads();

  // The warps' results merge as parts do: see the maths.
  for (int pack = threadIdx.x; pack < kRows * kPacks; pack += kThreads) {
    const int row = pack / kPacks, column = pack % kPacks * 8;
    const int i = query_of(row), h = head_of(row);
    if (i >= shape.T) break;
    float top = -INFINITY, total = 0.0f, sum[8] = {};
#pragma unroll
    for (int w = 0; w < kWarps<kD>; ++w) top = fmaxf(top, memory.top[w][row]);
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps<kD>; ++w) {
      const float weight = exp2_approx(memory.top[w][row] - base);
      total += weight * memory.total[w][row];
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] += weight * memory.o[w][row][column + c];
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (column == 0)
      lse[((int64_t{part} * shape.B + b) * shape.H + h) * shape.T + i] =
          total == 0.0f ? -INFINITY : (top + log2f(total)) * kLn2;
    if (column >= shape.Dv) continue;
    const int64_t at =
        (((int64_t{part} * shape.B + b) * shape.T + i) * shape.H + h) * shape.Dv + column;
    if (parts == 1) {
      Pack<T, 8> result;
#pragma unroll
      for (int c = 0; c < 8; ++c) result.set(c, sum[c] * inverse);
      store(static_cast<T*>(o) + at, result);
    } else if (begin < end) {  // a part without keys is skipped by the merge
      Pack<float, 4> results[2];
#pragma unroll
      for (int c = 0; c < 8; ++c) results[c / 4].value[c % 4] = sum[c] * inverse;
      store(static_cast<float*>(o) + at, results[0]);
      store(static_cast<float*>(o) + at + 4, results[1]);
    }
  }
}

// o and lse of one row, a warp, from those of its parts.
template <class T>
__global__ void __launch_bounds__(32 * kMergedRows)
    attention_decode_merge_kernel(const float* part_o, const float* part_lse, T* o, float* lse,
                                  int parts, Shape shape) {
  const int64_t rows = int64_t{shape.B} * shape.T * shape.H;  // (B, T, H); those of lse: (B, H, T)
  const int64_t row = int64_t{blockIdx.x} * kMergedRows + threadIdx.y;
  if (row >= rows) return;
  const int lane = threadIdx.x, h = row % shape.H, i = row / shape.H % shape.T;
  const int64_t lse_row = (row / shape.H / shape.T * shape.H + h) * shape.T + i;
  const auto lse_of = [&](int part) { return part_lse[part * rows + lse_row]; };

  float top[1] = {-INFINITY}, total[1] = {};
  for (int part = lane; part < parts; part += 32) top[0] = fmaxf(top[0], lse_of(part));
  warp_reduce<Max>(top);
  const float base = top[0] == -INFINITY ? 0.0f : top[0];
  for (int part = lane; part < parts; part += 32)
    total[0] += exp2_approx((lse_of(part) - base) * kLog2E);
  warp_reduce<Sum>(total);
  const float inverse = total[0] == 0.0f ? 0.0f : 1.0f / total[0];
  if (lane == 0) lse[lse_row] = total[0] == 0.0f ? -INFINITY : top[0] + logf(total[0]);
  for (int column = 4 * lane; column < shape.Dv; column += 4 * 32) {
    float sum[4] = {};
    for (int part = 0; part < parts; ++part) {
      const float of_part = lse_of(part);
      if (of_part == -INFINITY) continue;  // it may have written no o
      const float weight = exp2_approx((of_part - base) * kLog2E) * inverse;
      const auto values = load<4>(part_o + (part * rows + row) * shape.Dv + column);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += weight * values[c];
    }
    Pack<T, 4> result;
#pragma unroll
    for (int c = 0; c < 4; ++c) result.set(c, sum[c]);
    store(o + row * shape.Dv + column, result);
  }
}

}  // namespace

void attention_decode_fwd(Heads q, Heads k_cache, Heads v_cache, NewTokens fresh,
                          const int32_t* lengths, const int32_t* table, int64_t max_pages,
                          int64_t page_size, Slopes slopes, void* o, float* lse, float* part_o,
                          float* part_lse, int64_t parts, int64_t B, int64_t H, int64_t H_kv,
                          int64_t T, int64_t S, int64_t D, int64_t Dv, float scale, int64_t left,
                          float softcap, DType dtype, cudaStream_t stream) {
  if (B * H * T == 0) return;
  check_aligned("q", q);
  check_aligned("k_cache", k_cache);
  check_aligned("v_cache", v_cache);
  check_aligned("k", fresh.k);
  check_aligned("v", fresh.v);
  check_sizes(T + S, D, Dv);
  const Shape shape{static_cast<int>(B), static_cast<int>(H), static_cast<int>(H / H_kv),
                    static_cast<int>(T), static_cast<int>(S), static_cast<int>(D),
                    static_cast<int>(Dv)};
  const Pages pages{table, static_cast<int>(max_pages), static_cast<int>(page_size)};
  with_half_dtype(dtype, [&](auto t) {
    using Storage = decltype(t);
    with_head_dim(D, Dv, [&](auto columns) {
      constexpr int kD = columns;
      const int64_t blocks = ceil_div(T * (H / H_kv), int64_t{kRows}) * H_kv * B;
      LAUNCH((attention_decode_kernel<Storage, kD>),
             dim3(grid_of(blocks), static_cast<unsigned>(parts)), 32 * kWarps<kD>,
             sizeof(Memory<Storage, kD>), stream, q, k_cache, v_cache, fresh, lengths, pages,
             slopes, parts == 1 ? o : part_o, parts == 1 ? lse : part_lse, shape, scale,
             limit(left, T + S), softcap);
    });
    if (parts > 1)
      LAUNCH((attention_decode_merge_kernel<Storage>),
             grid_of(ceil_div(B * T * H, int64_t{kMergedRows})), dim3(32, kMergedRows), 0, stream,
             static_cast<const float*>(part_o), static_cast<const float*>(part_lse),
             static_cast<Storage*>(o), lse, static_cast<int>(parts), shape);
  });
}

}  // namespace gptfast::cuda
