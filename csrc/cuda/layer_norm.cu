// LayerNorm over the last dimension of x (M rows, N columns), RMSNorm where there is no mean, and
// their gradients. The maths stands in gptfast/ops/layer_norm.py.
//
// A row belongs to blockDim.x threads; where that is one warp, a block holds blockDim.y rows. Each
// thread takes a pack of 16 bytes and keeps it in registers, or in wide rows several, kept in shared
// memory: forward reads x and writes y once, backward reads dy and x and writes dx once. Only rows
// that do not fit into shared memory are read again for every sweep.
//
// dw and db are summed in two stages, without atomics. Each of `programs` groups of threads walks
// over its rows p, p + programs, ... and sums its columns in registers, or for wide rows in shared
// memory; a second kernel adds the programs' sums in a fixed order. Where shared memory is too small
// for the sums of a row, they take a kernel of their own, which reads dy and x once more.
#include "common.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

constexpr int kMaxThreads = 512;  // with more, 64 registers a thread do not hold backward's sums
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

// This thread's packs of one row, read from global memory once. cache: shared memory for N elements,
// or null where there is no room (or no need, as the one pack is in registers).
template <class T, int kWidth, bool kWide>
struct Row {
  const T* source;
  Pack<T, kWidth> own;

  __device__ __forceinline__ Row(const T* row, T* cache, int64_t N)
      : source(kWide && cache ? cache : row) {
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
      if constexpr (!kWide)
        own = load<kWidth>(row + c);
      else if (cache)
        store(cache + c, load<kWidth>(row + c));
    });
  }
  __device__ __forceinline__ Pack<T, kWidth> at(int64_t c) const {
    if constexpr (kWide)
      return load<kWidth>(source + c);
    else
      return own;
  }
};

template <class T, int kWidth, bool kWide>
__global__ void __launch_bounds__(kMaxThreads)
    layer_norm_fwd_kernel(const T* __restrict__ x, Parameter w, Parameter b, T* __restrict__ y,
                          float* __restrict__ mean, float* __restrict__ rstd, int64_t M, int64_t N,
                          float eps, bool cached) {
  DYN_SMEM(memory);
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = row < M;
  if (!live) row = M - 1;  // takes part, and writes nothing
  const Row<T, kWidth, kWide> xs(x + row * N, cached ? reinterpret_cast<T*>(memory) : nullptr, N);
  float mu = 0.0f;
  if (mean) {
    float sum[1] = {};
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
      const auto pack = xs.at(c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[0] += pack[i];
    });
    row_reduce<Sum>(sum);
    mu = sum[0] / N;
  }
  float squares[1] = {};
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
    const auto pack = xs.at(c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares[0] += (pack[i] - mu) * (pack[i] - mu);
  });
  row_reduce<Sum>(squares);
  const float rs = 1.0f / sqrtf(squares[0] / N + eps);
  if (!live) return;
  if (threadIdx.x == 0) {
    if (mean) mean[row] = mu;
    rstd[row] = rs;
  }
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
    auto pack = xs.at(c);
    float scale[kWidth], shift[kWidth];
    w.load(c, scale, 1.0f);
    b.load(c, shift, 0.0f);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack.set(i, (pack[i] - mu) * rs * scale[i] + shift[i]);
    store(y + row * N + c, pack);
  });
}

// Where a backward block keeps what in shared memory.
struct BackwardMemory {
  bool sums;    // 2 N floats, of wide rows
  bool caches;  // N elements of dy and of x
};

// dx may be null, and so may partial, (programs, 2, N). inverse_n: 1 / N, as a division here would
// spill registers around its call.
template <class T, int kWidth, bool kWide>
__global__ void __launch_bounds__(kMaxThreads)
    layer_norm_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, Parameter w,
                          const float* __restrict__ mean, const float* __restrict__ rstd,
                          T* __restrict__ dx, float* __restrict__ partial, int64_t programs,
                          int64_t M, int64_t N, float inverse_n, BackwardMemory keeps) {
  DYN_SMEM(memory);
  float* const shared_sums = reinterpret_cast<float*>(memory);
  T* const dy_cache = reinterpret_cast<T*>(memory + (keeps.sums ? 2 * N * sizeof(float) : 0));
  float own_sums[2][kWidth] = {};  // of the one pack, where rows are not wide
  const auto sum_at = [&](int which, int64_t c, int i) -> float& {
    return kWide ? shared_sums[which * N + c + i] : own_sums[which][i];
  };
  if (kWide && partial)
    for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum_at(0, c, i) = sum_at(1, c, i) = 0.0f;
    });

  const int64_t program = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // A block's last groups may be more than there are programs; only rows of one warp, which meet no
  // barrier, share a block.
  if (program >= programs) return;
  for (int64_t row = program; row < M; row += programs) {
    const float mu = mean ? mean[row] : 0.0f, rs = rstd[row];
    const Row<T, kWidth, kWide> dys(dy + row * N, keeps.caches ? dy_cache : nullptr, N);
    const Row<T, kWidth, kWide> xs(x + row * N, keeps.caches ? dy_cache + N : nullptr, N);
    // body(c, dy, xhat, wdy), the last three of kWidth values
    const auto sweep = [&](const auto& body) {
      for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
        const auto dy_pack = dys.at(c), x_pack = xs.at(c);
        float xhat[kWidth], wdy[kWidth];
        w.load(c, wdy, 1.0f);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          xhat[i] = (x_pack[i] - mu) * rs;
          wdy[i] *= dy_pack[i];
        }
        body(c, dy_pack, xhat, wdy);
      });
    };
    float c1_c2[2] = {};
    sweep([&](int64_t c, const auto& dy_pack, auto& xhat, auto& wdy) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        c1_c2[0] += wdy[i] * xhat[i];
        c1_c2[1] += wdy[i];
      }
      if (!partial) return;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum_at(0, c, i) += dy_pack[i] * xhat[i];
        sum_at(1, c, i) += dy_pack[i];
      }
    });
    if (!dx) continue;
    row_reduce<Sum>(c1_c2);
    const float c1 = c1_c2[0] * inverse_n, c2 = mean ? c1_c2[1] * inverse_n : 0.0f;
    sweep([&](int64_t c, auto&, auto& xhat, auto& wdy) {
      Pack<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.set(i, (wdy[i] - c1 * xhat[i] - c2) * rs);
      store(dx + row * N + c, out);
    });
  }
  if (!partial) return;
  partial += program * 2 * N;
  for_each_pack<kWidth, kWide>(N, [&](int64_t c) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      partial[c + i] = sum_at(0, c, i);
      partial[N + c + i] = sum_at(1, c, i);
    }
  });
}

// A column per thread, over the rows of program blockIdx.y, blockIdx.y + programs, ...
template <class T>
__global__ void __launch_bounds__(256)
    layer_norm_bwd_dw_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                             const float* __restrict__ mean, const float* __restrict__ rstd,
                             float* __restrict__ partial, int64_t M, int64_t N) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= N) return;
  float dw = 0.0f, db = 0.0f;
  for (int64_t row = blockIdx.y; row < M; row += gridDim.y) {
    const float grad = to_float(dy[row * N + c]), mu = mean ? mean[row] : 0.0f;
    dw += grad * ((to_float(x[row * N + c]) - mu) * rstd[row]);
    db += grad;
  }
  partial += int64_t{blockIdx.y} * 2 * N + c;
  partial[0] = dw;
  partial[N] = db;
}

// Row blockIdx.y of (dw, db), 32 columns a block: sum_p partial_pj. Warp i of the block adds the
// programs i, i + 32, ...; then the 32 sums are added in turn.
__global__ void __launch_bounds__(32 * 32)
    layer_norm_bwd_sum_kernel(const float* __restrict__ partial, float* __restrict__ dw,
                              float* __restrict__ db, int64_t programs, int64_t N) {
  __shared__ float of_warp[32][32];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0.0f;
  if (c < N)
    for (int64_t p = warp; p < programs; p += 32) sum += partial[(p * 2 + blockIdx.y) * N + c];
  of_warp[warp][lane] = sum;
  __syncthreads();
  float* const out = blockIdx.y == 0 ? dw : db;
  if (warp != 0 || c >= N || !out) return;
  for (int i = 1; i < 32; ++i) sum += of_warp[i][lane];
  out[c] = sum;
}

// Calls body(width constant, wide constant, block) for rows of N elements. One pack a thread for as
// long as a block has threads, which leaves most loads in flight; single elements, which are what
// unaligned rows take, soon more than one, since they cost a thread as much as a pack does.
template <class T, class Body>
void with_shape(bool aligned, int64_t N, const Body& body) {
  with_width<T>(aligned, N, [&](auto width) {
    const int64_t packs = ceil_div(N, int64_t{width});
    if (packs > (width == 1 ? 128 : kMaxThreads)) {
      const int64_t threads = ceil_div(packs, int64_t{4 * 32}) * 32;
      body(width, std::true_type{}, dim3(threads < kMaxThreads ? threads : kMaxThreads));
    } else {
      const unsigned warps = packs <= 32 ? 1 : static_cast<unsigned>(ceil_div(packs, int64_t{32}));
      body(width, std::false_type{}, dim3(32 * warps, warps == 1 ? kRowsPerBlock : 1));
    }
  });
}

}  // namespace

void layer_norm_fwd(const void* x, const void* w, DType w_dtype, const void* b, DType b_dtype,
                    void* y, float* mean, float* rstd, int64_t M, int64_t N, float eps,
                    int64_t shared_bytes, DType dtype, cudaStream_t stream) {
  if (M == 0) return;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_shape<T>(aligned_16(x, w, b, y), N, [&](auto width, auto wide, dim3 block) {
      const int64_t cache = N * static_cast<int64_t>(sizeof(T));
      const bool cached = wide && cache <= shared_bytes;
      LAUNCH((layer_norm_fwd_kernel<T, width, wide>), grid_of(ceil_div(M, int64_t{block.y})), block,
             cached ? static_cast<size_t>(cache) : 0, stream, static_cast<const T*>(x),
             (Parameter{w, w_dtype}), (Parameter{b, b_dtype}), static_cast<T*>(y), mean, rstd, M, N,
             eps, cached);
    });
  });
}

void layer_norm_bwd(const void* dy, const void* x, const void* w, DType w_dtype, const float* mean,
                    const float* rstd, void* dx, float* dw, float* db, float* partial,
                    int64_t programs, int64_t M, int64_t N, int64_t shared_bytes, DType dtype,
                    cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  const bool needs_dw = dw || db;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto *dy_t = static_cast<const T*>(dy), *x_t = static_cast<const T*>(x);
    with_shape<T>(aligned_16(dy, x, w, dx), N, [&](auto width, auto wide, dim3 block) {
      const int64_t cache = 2 * N * static_cast<int64_t>(sizeof(T));
      const int64_t sums = 2 * N * static_cast<int64_t>(sizeof(float));
      BackwardMemory keeps{wide && needs_dw && sums <= shared_bytes, false};
      keeps.caches = wide && dx && cache + (keeps.sums ? sums : 0) <= shared_bytes;
      const bool together = needs_dw && (keeps.sums || !wide);
      if (dx || together)
        LAUNCH((layer_norm_bwd_kernel<T, width, wide>),
               grid_of(ceil_div(programs, int64_t{block.y})), block,
               static_cast<size_t>((keeps.sums ? sums : 0) + (keeps.caches ? cache : 0)), stream,
               dy_t, x_t, (Parameter{w, w_dtype}), mean, rstd, static_cast<T*>(dx),
               together ? partial : nullptr, programs, M, N, 1.0f / N, keeps);
      if (needs_dw && !together)
        LAUNCH((layer_norm_bwd_dw_kernel<T>),
               dim3(grid_of(ceil_div(N, int64_t{256})), static_cast<unsigned>(programs)), 256, 0,
               stream, dy_t, x_t, mean, rstd, partial, M, N);
    });
  });
  if (needs_dw)
    LAUNCH(layer_norm_bwd_sum_kernel, dim3(grid_of(ceil_div(N, int64_t{32})), 2), dim3(32, 32), 0,
           stream, static_cast<const float*>(partial), dw, db, programs, N);
}

}  // namespace gptfast::cuda
