// LayerNorm over the last dimension (M rows, N columns), RMSNorm where there is no mean, and their
// gradients, alone or behind the sum of the residual stream: r = residual + z (x + x_bias), or r = x.
// The maths stands in gptfast/ops/layer_norm.py and gptfast/ops/add_layer_norm.py.
//
// A row belongs to blockDim.x threads; where that is one warp, a block holds blockDim.y rows. Each
// thread takes a pack of 16 bytes and keeps it in registers, or in wide rows several, kept in shared
// memory: forward reads x (and residual) and writes y (and r) once, backward reads dy, r (and dr) and
// writes dresidual (and dx) once. Only the columns for which shared memory has no room are read again
// for every sweep.
//
// dw, db and dx_bias are summed in two stages, without atomics. Each of `programs` groups of threads
// walks over its rows p, p + programs, ... and sums its columns in registers, or for wide rows in
// shared memory; a second kernel adds the programs' sums in a fixed order. Where shared memory is too
// small for the sums of a row, they take a kernel of their own, which reads everything once more.
#include "column_sums.cuh"
#include "launchers.h"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

// With more, 64 registers a thread do not hold backward's sums. One block of them is enough for ptxas
// to plan with (the 1 in __launch_bounds__): for a second one it would spill.
constexpr int kMaxThreads = 512;
constexpr int kRowsPerBlock = 4;  // where a row takes one warp

// Calls body(column) for every pack of this thread. kWide: a thread may have several.
template <int kWidth, bool kWide, class Body>
__device__ __forceinline__ void for_each_pack(int64_t N, const Body& body) {
  const int64_t first = int64_t{threadIdx.x} * kWidth;
  if constexpr (kWide) {
#pragma unroll 2
    for (int64_t c = first; c < N; c += blockDim.x * kWidth) body(c);
  } else {
    if (first < N) body(first);
  }
}

// This thread's packs of one row: read(column) once, then kept, a single one in registers, several
// (kWide) in `cache`: shared memory for the first `kept` columns. The others are read again, from
// `again` in global memory.
template <class T, int kWidth, bool kWide>
struct Row {
  const T *again, *cache;
  int64_t kept;
  Pack<T, kWidth> own;

  template <class Read>
  __device__ __forceinline__ Row(const T* again, T* cache, int64_t kept, int64_t N,
                                 const Read& read)
      : again(again), cache(cache), kept(kept) {
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
      const Pack<T, kWidth> pack = read(c);
      if constexpr (!kWide)
        own = pack;
      else if (c < kept)
        store(cache + c, pack);
    });
  }
  // Of a row that is `from`; null: zeros.
  __device__ __forceinline__ Row(const T* from, T* cache, int64_t kept, int64_t N)
      : again(from), cache(cache), kept(kept) {
    for_each_pack<kWidth, kWide>(kWide ? kept : N, [&](int64_t c) {
      const Pack<T, kWidth> pack = from ? load<kWidth>(from + c) : Pack<T, kWidth>{};
      if constexpr (kWide)
        store(cache + c, pack);
      else
        own = pack;
    });
  }
  __device__ __forceinline__ Pack<T, kWidth> at(int64_t c) const {
    if constexpr (kWide)
      return load<kWidth>((c < kept ? cache : again) + c);
    else
      return own;
  }
};

// What is normalised, (M, N) like everything else here. Without a residual it is x, and r is not
// written.
template <class T, class R>
struct Stream {
  const T* x;
  const R* residual;
  Parameter x_bias;
  Dropout dropout;
  R* r;

  template <int kWidth>
  __device__ __forceinline__ Pack<R, kWidth> read(int64_t row, int64_t c, int64_t N,
                                                  bool live) const {
    const auto branch = load<kWidth>(x + row * N + c);
    if constexpr (std::is_same_v<T, R>)
      if (!residual) return branch;
    Pack<R, kWidth> out;
    float sum[kWidth];
    x_bias.load(c, sum, 0.0f);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += branch[i];
    dropout.apply(row, c, sum);
    const auto stream = load<kWidth>(residual + row * N + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.set(i, stream[i] + sum[i]);
    if (live) store(r + row * N + c, out);
    return out;
  }
  __device__ __forceinline__ const R* written() const {
    if constexpr (std::is_same_v<T, R>) return residual ? r : x;
    return r;
  }
};

// inverse_n: 1 / N, here and in backward, as a division in a kernel is a call that spills registers.
template <class T, class R, int kWidth, bool kWide>
__global__ void __launch_bounds__(kMaxThreads, 1)
    layer_norm_fwd_kernel(Stream<T, R> stream, Parameter w, Parameter b, T* __restrict__ y,
                          float* __restrict__ mean, float* __restrict__ rstd, int64_t M, int64_t N,
                          float inverse_n, float eps, int64_t kept) {
  DYN_SMEM(memory);
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = row < M;
  if (!live) row = M - 1;  // takes part, and writes nothing
  const Row<R, kWidth, kWide> rows(
      stream.written() + row * N, reinterpret_cast<R*>(memory), kept, N,
      [&](int64_t c) { return stream.template read<kWidth>(row, c, N, live); });
  float mu = 0.0f;
  if (mean) {
    float sum[1] = {};
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
      const auto pack = rows.at(c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[0] += pack[i];
    });
    row_reduce<Sum>(sum);
    mu = sum[0] * inverse_n;
  }
  float squares[1] = {};
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
    const auto pack = rows.at(c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares[0] += (pack[i] - mu) * (pack[i] - mu);
  });
  row_reduce<Sum>(squares);
  const float rs = rsqrtf(squares[0] * inverse_n + eps);
  if (!live) return;
  if (threadIdx.x == 0) {
    if (mean) mean[row] = mu;
    rstd[row] = rs;
  }
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
    const auto pack = rows.at(c);
    Pack<T, kWidth> out;
    float scale[kWidth], shift[kWidth];
    w.load(c, scale, 1.0f);
    b.load(c, shift, 0.0f);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.set(i, (pack[i] - mu) * rs * scale[i] + shift[i]);
    store(y + row * N + c, out);
  });
}

// What backward is given, and where its results go. dy, dr and mean may be null, and so may every
// result. partial: (programs, sums, N).
template <class T, class R>
struct Backward {
  const T* dy;
  const R *r, *dr;
  Parameter w;
  const float *mean, *rstd;
  Dropout dropout;
  R* dresidual;
  T* dx;
  float *partial, *c1_c2;
  int64_t programs, M, N;
  float inverse_n;
  int sums;  // for dw, db and dx_bias: the first of these

  __device__ __forceinline__ bool sums_dx_bias() const { return sums == 3; }
};

// Where a backward block keeps what in shared memory.
struct BackwardMemory {
  bool sums;     // floats, of wide rows
  int64_t kept;  // of a wide row, columns of r and of dy
};

template <class T, class R, int kWidth, bool kWide>
__global__ void __launch_bounds__(kMaxThreads, 1)
    layer_norm_bwd_kernel(const Backward<T, R> a, const BackwardMemory keeps) {
  DYN_SMEM(memory);
  const int64_t N = a.N;
  float* const shared_sums = reinterpret_cast<float*>(memory);
  R* const r_cache = reinterpret_cast<R*>(memory + (keeps.sums ? a.sums * N * sizeof(float) : 0));
  T* const dy_cache = reinterpret_cast<T*>(r_cache + keeps.kept);
  float own_sums[kMostSums][kWidth] = {};  // of the one pack, where rows are not wide
  const auto sum_at = [&](int which, int64_t c, int i) -> float& {
    return kWide ? shared_sums[which * N + c + i] : own_sums[which][i];
  };
  if (kWide && a.partial)
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
      for (int which = 0; which < a.sums; ++which)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) shared_sums[which * N + c + i] = 0.0f;
    });

  const int64_t program = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // A block's last groups may be more than there are programs; only rows of one warp, which meet no
  // barrier, share a block.
  if (program >= a.programs) return;
  for (int64_t row = program; row < a.M; row += a.programs) {
    const float mu = a.mean ? a.mean[row] : 0.0f, rs = a.rstd[row];
    const T* const dy_row = a.dy ? a.dy + row * N : nullptr;
    const Row<T, kWidth, kWide> dys(dy_row, dy_cache, keeps.kept, N);
    const Row<R, kWidth, kWide> rows(a.r + row * N, r_cache, keeps.kept, N);
    // body(c, dy, xhat, wdy), the last three of kWidth values
    const auto sweep = [&](const auto& body) {
      for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
        const auto dy_pack = dys.at(c);
        const auto r_pack = rows.at(c);
        float xhat[kWidth], wdy[kWidth];
        a.w.load(c, wdy, 1.0f);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          xhat[i] = (r_pack[i] - mu) * rs;
          wdy[i] *= dy_pack[i];
        }
        body(c, dy_pack, xhat, wdy);
      });
    };
    float c1_c2[2] = {};
    if (dy_row)
      sweep([&](int64_t c, const auto& dy_pack, auto& xhat, auto& wdy) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          c1_c2[0] += wdy[i] * xhat[i];
          c1_c2[1] += wdy[i];
        }
        if (!a.partial) return;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sum_at(0, c, i) += dy_pack[i] * xhat[i];
          if (!kWide || a.sums > 1) sum_at(1, c, i) += dy_pack[i];
        }
      });
    if (!a.dresidual && !a.dx && !a.sums_dx_bias()) continue;
    if (dy_row) row_reduce<Sum>(c1_c2);
    const float c1 = c1_c2[0] * a.inverse_n, c2 = a.mean ? c1_c2[1] * a.inverse_n : 0.0f;
    if (a.c1_c2 && threadIdx.x == 0) {
      a.c1_c2[2 * row] = c1;
      a.c1_c2[2 * row + 1] = c2;
    }
    const auto finish = [&](int64_t c, auto& total) {
      if (a.dr) {
        const auto pack = load<kWidth>(a.dr + row * N + c);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) total[i] += pack[i];
      }
      if (a.dresidual) {
        Pack<R, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out.set(i, total[i]);
        store(a.dresidual + row * N + c, out);
      }
      if (!a.dx && !a.sums_dx_bias()) return;
      a.dropout.apply(row, c, total);
      if (a.dx) {
        Pack<T, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out.set(i, total[i]);
        store(a.dx + row * N + c, out);
      }
      if (a.partial && a.sums_dx_bias())
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum_at(2, c, i) += total[i];
    };
    if (dy_row)
      sweep([&](int64_t c, auto&, auto& xhat, auto& wdy) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) wdy[i] = (wdy[i] - c1 * xhat[i] - c2) * rs;
        finish(c, wdy);
      });
    else
      for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
        float total[kWidth] = {};
        finish(c, total);
      });
  }
  if (!a.partial) return;
  float* const partial = a.partial + program * a.sums * N;
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
#pragma unroll
    for (int which = 0; which < kMostSums; ++which)
      if (which < a.sums)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) partial[which * N + c + i] = sum_at(which, c, i);
  });
}

// A column per thread, over the rows of program blockIdx.y, blockIdx.y + programs, ...
template <class T, class R>
__global__ void __launch_bounds__(256) layer_norm_bwd_sums_kernel(const Backward<T, R> a) {
  const int64_t N = a.N, c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= N) return;
  float sum[kMostSums] = {};
  const float weight = a.w.data ? a.w.at(c) : 1.0f;
  for (int64_t row = blockIdx.y; row < a.M; row += gridDim.y) {
    const float grad = a.dy ? to_float(a.dy[row * N + c]) : 0.0f;
    const float mu = a.mean ? a.mean[row] : 0.0f, rs = a.rstd[row];
    const float xhat = (to_float(a.r[row * N + c]) - mu) * rs;
    sum[0] += grad * xhat;
    sum[1] += grad;
    if (!a.sums_dx_bias()) continue;
    float total[1] = {(grad * weight - a.c1_c2[2 * row] * xhat - a.c1_c2[2 * row + 1]) * rs};
    if (a.dr) total[0] += to_float(a.dr[row * N + c]);
    a.dropout.apply(row, c, total);
    sum[2] += total[0];
  }
  float* const partial = a.partial + int64_t{blockIdx.y} * a.sums * N + c;
#pragma unroll
  for (int which = 0; which < kMostSums; ++which)
    if (which < a.sums) partial[which * N] = sum[which];
}

// Calls body(width constant, wide constant, block) for rows of N elements. One pack a thread for as
// long as a block has threads, which leaves most loads in flight. Single elements, which are what
// unaligned rows take, are always several to a thread, since they cost it as much as a pack does.
template <class T, class Body>
void with_shape(bool aligned, int64_t N, const Body& body) {
  with_width<T>(aligned, N, [&](auto width) {
    const int64_t packs = ceil_div(N, int64_t{width});
    if (width > 1 && packs <= kMaxThreads) {
      const unsigned warps = packs <= 32 ? 1 : static_cast<unsigned>(ceil_div(packs, int64_t{32}));
      if constexpr (width > 1)  // which is not compiled for single elements
        body(width, std::false_type{}, dim3(32 * warps, warps == 1 ? kRowsPerBlock : 1));
    } else {
      const int64_t threads = ceil_div(packs, int64_t{4 * 32}) * 32;
      body(width, std::true_type{}, dim3(threads < kMaxThreads ? threads : kMaxThreads));
    }
  });
}

// How many of a wide row's columns `room` bytes of shared memory keep, in whole packs.
int64_t columns_kept(int64_t room, int64_t bytes_of_column, int64_t N, int width) {
  const int64_t columns = room / bytes_of_column;
  return columns < N ? columns - columns % width : N;
}

}  // namespace

void layer_norm_fwd(const void* x, const void* residual, const void* x_bias, DType x_bias_dtype,
                    const void* w, DType w_dtype, const void* b, DType b_dtype, const int64_t* seed,
                    int64_t threshold, void* y, void* r, float* mean, float* rstd, int64_t M,
                    int64_t N, float eps, int64_t shared_bytes, DType r_dtype, DType x_dtype,
                    cudaStream_t stream) {
  if (M == 0) return;
  with_stream_dtype(x_dtype, r_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using R = decltype(s);
    const bool aligned = aligned_16(x, residual, x_bias, w, b, y, r);
    const Dropout dropout(seed, threshold);
    const Stream<T, R> sum{static_cast<const T*>(x), static_cast<const R*>(residual),
                           Parameter{x_bias, x_bias_dtype}, dropout, static_cast<R*>(r)};
    with_shape<T>(aligned, N, [&](auto width, auto wide, dim3 block) {
      const int64_t kept = wide ? columns_kept(shared_bytes, sizeof(R), N, width) : 0;
      LAUNCH((layer_norm_fwd_kernel<T, R, width, wide>), grid_of(ceil_div(M, int64_t{block.y})),
             block, kept * sizeof(R), stream, sum, (Parameter{w, w_dtype}), (Parameter{b, b_dtype}),
             static_cast<T*>(y), mean, rstd, M, N, 1.0f / N, eps, kept);
    });
  });
}

void layer_norm_bwd(const void* r, const void* dy, const void* dr, const void* w, DType w_dtype,
                    const float* mean, const float* rstd, const int64_t* seed, int64_t threshold,
                    void* dresidual, void* dx, float* dw, float* db, float* dx_bias, float* partial,
                    float* c1_c2, int64_t programs, int64_t M, int64_t N, int64_t shared_bytes,
                    DType x_dtype, DType r_dtype, cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  const bool needs_sums = dw || db || dx_bias;
  const int sums = dx_bias ? 3 : db ? 2 : 1;
  with_stream_dtype(x_dtype, r_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using R = decltype(s);
    Backward<T, R> a{static_cast<const T*>(dy),
                     static_cast<const R*>(r),
                     static_cast<const R*>(dr),
                     Parameter{w, w_dtype},
                     mean,
                     rstd,
                     Dropout(seed, threshold),
                     static_cast<R*>(dresidual),
                     static_cast<T*>(dx),
                     partial,
                     nullptr,
                     programs,
                     M,
                     N,
                     1.0f / N,
                     sums};
    const bool aligned = aligned_16(r, dy, dr, w, dresidual, dx);
    with_shape<T>(aligned, N, [&](auto width, auto wide, dim3 block) {
      const int64_t of_sums = sums * N * static_cast<int64_t>(sizeof(float));
      constexpr int64_t kColumn = sizeof(T) + sizeof(R);
      BackwardMemory keeps{wide && needs_sums && of_sums <= shared_bytes, 0};
      const int64_t used = keeps.sums ? of_sums : 0;
      const bool rows = dresidual || dx || dx_bias;
      if (wide && rows) keeps.kept = columns_kept(shared_bytes - used, kColumn, N, width);
      const bool together = needs_sums && (keeps.sums || !wide);
      if (rows || together) {
        auto of_rows = a;
        if (!together) {
          of_rows.partial = nullptr;
          of_rows.c1_c2 = dx_bias ? c1_c2 : nullptr;
        }
        LAUNCH((layer_norm_bwd_kernel<T, R, width, wide>),
               grid_of(ceil_div(programs, int64_t{block.y})), block,
               static_cast<size_t>(used + keeps.kept * kColumn), stream, of_rows, keeps);
      }
      if (needs_sums && !together) {
        a.c1_c2 = c1_c2;
        LAUNCH((layer_norm_bwd_sums_kernel<T, R>),
               dim3(grid_of(ceil_div(N, int64_t{256})), static_cast<unsigned>(programs)), 256, 0,
               stream, a);
      }
    });
  });
  if (needs_sums) add_column_sums(partial, {{dw, db, dx_bias}}, sums, programs, N, stream);
}

}  // namespace gptfast::cuda
