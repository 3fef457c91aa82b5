// Flash attention, forward. The maths stands in gptfast/ops/attention.py, that of a tile in
// attention_tile.cuh.
//
// A block takes 16 queries a warp of one head and walks over the tiles of keys that they see. It
// reads its queries once, each of those keys and values once, and writes o and lse once, all in 16
// bytes. Copies run behind the products: values come while scores are computed, and the next keys
// while values are added up. What a mask hides from a whole block is not read, what it hides from a
// warp is not computed, and masks are applied only in tiles that an edge cuts.
#include "attention_tile.cuh"

namespace gptfast::cuda {
namespace {

// Two or three blocks of four warps fit into the registers of a multiprocessor, and one multiplies while
// another takes exponentials. At 256 columns o alone fills 128 registers of each thread, and scores of
// 64 keys would not fit beside it.
constexpr int kWarps = 4;
constexpr int kQueries = 16 * kWarps;
template <int kD>
constexpr int kKeys = kD <= 128 ? 64 : 32;

struct Shape {
  int H, group;  // query heads, and how many of them share a key head
  int T, S;      // of packed sequences: of the longest one
  int D, Dv;
};

// Where sequence b of packed ones begins, and its lengths; of others those of all.
struct Sequence {
  int64_t first_q = 0, first_k = 0;
  int T, S;

  __device__ __forceinline__ Sequence(const Shape& shape, const int* ends_q, const int* ends_k,
                                      int b)
      : T(shape.T), S(shape.S) {
    if (!ends_q) return;
    first_q = ends_q[b], T = ends_q[b + 1] - ends_q[b];
    first_k = ends_k[b], S = ends_k[b + 1] - ends_k[b];
  }
};

// Starts copying rows `first` and following of a head into a tile; zeros stand for rows from `end` on
// and for columns from D on.
template <int kRows, int kD, class T>
__device__ __forceinline__ void fetch_rows(T* tile, const T* head, int64_t stride, int first,
                                           int end, int D) {
  constexpr int kPacks = kD / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPacks; i += 32 * kWarps) {
    const int row = i / kPacks, column = i % kPacks * 8;
    const bool there = first + row < end && column < D;
    cp_async_16(tile + row * kPitch<kD> + column,
                there ? head + (first + row) * stride + column : head, there);
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(32 * kWarps)
    attention_fwd_kernel(Heads q, Heads k, Heads v, Heads o, Rows lse, const int* ends_q,
                         const int* ends_k, Shape shape, float scale, int left, int right) {
  DYN_SMEM(memory);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const k_tile = q_tile + kQueries * kPitch<kD>;
  T* const v_tile = k_tile + kKeys<kD> * kPitch<kD>;

  // Under a causal mask the last queries see the most keys: they begin first.
  const int blocks = ceil_div(shape.T, kQueries);
  const int first = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * kQueries;
  const int bh = blockIdx.x / blocks, b = bh / shape.H, h = bh % shape.H;
  const Sequence at(shape, ends_q, ends_k, b);
  if (first >= at.T) return;
  const T* const k_head = row_of<T>(k, b, h / shape.group, at.first_k);
  const T* const v_head = row_of<T>(v, b, h / shape.group, at.first_k);

  // Query i sees the keys from lowest(i) to highest(i).
  const int diagonal = at.S - at.T;
  const auto lowest = [&](int i) { return max(i + diagonal - left, 0); };
  const auto highest = [&](int i) { return min(i + diagonal + right, at.S - 1); };
  const int begin = lowest(first) / kKeys<kD> * kKeys<kD>;
  const int end = highest(min(first + kQueries, at.T) - 1) + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int near = first + 16 * warp, far = near + 15;  // queries of this warp

  fetch_rows<kQueries, kD>(q_tile, row_of<T>(q, b, h, at.first_q), q.stride_t, first, at.T,
                           shape.D);
  if (begin < end) fetch_rows<kKeys<kD>, kD>(k_tile, k_head, k.stride_t, begin, end, shape.D);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  T* const own_tile = q_tile + 16 * warp * kPitch<kD>;
  AttentionTile<T, kD> own(own_tile);
  for (int start = begin; start < end; start += kKeys<kD>) {
    fetch_rows<kKeys<kD>, kD>(v_tile, v_head, v.stride_t, start, end, shape.Dv);
    cp_async_commit();
    const bool seen = near < at.T && start <= highest(far) && start + kKeys<kD> > lowest(near);
    float s[kKeys<kD> / 8][4];
    if (seen) {
      own.template scores<kKeys<kD>>(k_tile, s);
      const bool whole = start >= lowest(far) && start + kKeys<kD> <= highest(near) + 1;
#pragma unroll
      for (int n = 0; n < kKeys<kD> / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[n][j] *= scale;
      if (!whole) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = near + lane / 4 + 8 * half;
          const int low = lowest(i), high = highest(i);
#pragma unroll
          for (int n = 0; n < kKeys<kD> / 8; ++n)
#pragma unroll
            for (int column = 0; column < 2; ++column) {
              const int key = start + 8 * n + 2 * (lane % 4) + column;
              if (key < low || key > high) s[n][2 * half + column] = -INFINITY;
            }
        }
      }
      own.softmax(s);
    }
    cp_async_wait<0>();
    __syncthreads();  // values are there, and nobody reads these keys any more
    if (start + kKeys<kD> < end) {
      fetch_rows<kKeys<kD>, kD>(k_tile, k_head, k.stride_t, start + kKeys<kD>, end, shape.D);
      cp_async_commit();
    }
    if (seen) own.add_values(s, v_tile);
    cp_async_wait<0>();
    __syncthreads();  // the next keys are there, and nobody reads these values any more
  }
  if (near >= at.T) return;

  own.sum_totals();
  __syncwarp();  // no lane reads queries any more: o takes their place
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half, i = near + row;
    const float total = own.total[half], inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      Pack<T, 2> pair;
      pair.set(0, own.o[n][2 * half] * inverse);
      pair.set(1, own.o[n][2 * half + 1] * inverse);
      store(own_tile + row * kPitch<kD> + 8 * n + 2 * (lane % 4), pair);
    }
    if (lane % 4 == 0 && i < at.T)
      lse.data[b * lse.stride_b + h * lse.stride_h + at.first_q + i] =
          total == 0.0f ? -INFINITY : (own.top[half] + log2f(total)) * kLn2;
  }
  __syncwarp();
  for (int pack = lane; pack < 16 * kD / 8; pack += 32) {
    const int row = pack / (kD / 8), column = pack % (kD / 8) * 8;
    if (near + row < at.T && column < shape.Dv)
      store(row_of<T>(o, b, h, at.first_q + near + row) + column,
            load<8>(own_tile + row * kPitch<kD> + column));
  }
}

}  // namespace

void attention_fwd(Heads q, Heads k, Heads v, Heads o, Rows lse, const int32_t* ends_q,
                   const int32_t* ends_k, int64_t B, int64_t H, int64_t H_kv, int64_t T, int64_t S,
                   int64_t D, int64_t Dv, float scale, int64_t left, int64_t right, DType dtype,
                   cudaStream_t stream) {
  if (B * H * T == 0) return;
  check_aligned("q", q);
  check_aligned("k", k);
  check_aligned("v", v);
  check_aligned("o", o);
  check_sizes(T + S, D, Dv);
  const Shape shape{static_cast<int>(H), static_cast<int>(H / H_kv), static_cast<int>(T),
                    static_cast<int>(S), static_cast<int>(D),        static_cast<int>(Dv)};
  with_half_dtype(dtype, [&](auto t) {
    with_head_dim(D, Dv, [&](auto columns) {
      using Storage = decltype(t);
      constexpr int kD = columns;
      constexpr size_t kBytes = (kQueries + 2 * kKeys<kD>)*kPitch<kD> * sizeof(Storage);
      LAUNCH((attention_fwd_kernel<Storage, kD>), grid_of(ceil_div(T, int64_t{kQueries}) * B * H),
             32 * kWarps, kBytes, stream, q, k, v, o, lse, ends_q, ends_k, shape, scale * kLog2E,
             limit(left, T + S), limit(right, T + S));
    });
  });
}

}  // namespace gptfast::cuda
