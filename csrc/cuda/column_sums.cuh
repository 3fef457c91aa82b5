// The second stage of sums over rows: what the programs of a backward kernel left in `partial`.
#pragma once
#include "common.cuh"

namespace gptfast::cuda {

constexpr int kMostSums = 3;

struct ColumnSums {
  float* of[kMostSums];  // null where nobody asked
};

// Sum blockIdx.y, 32 columns a block: sum_p partial[p][blockIdx.y][c], partial (programs, sums, N).
// A block has a warp for each program, but at most kMostWarps. Warp i adds the programs i, i + warps,
// ...; then the warps' sums are added in turn.
template <int kMostWarps>
__global__ void __launch_bounds__(32 * kMostWarps)
    column_sums_kernel(const float* __restrict__ partial, ColumnSums out, int64_t programs,
                       int64_t N) {
  __shared__ float of_warp[kMostWarps][32];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  float* const to = blockIdx.y == 0 ? out.of[0] : blockIdx.y == 1 ? out.of[1] : out.of[2];
  if (!to) return;  // the whole block
  float sum = 0.0f;
  if (c < N)
    for (int64_t p = warp; p < programs; p += warps)
      sum += partial[(p * gridDim.y + blockIdx.y) * N + c];
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= N) return;
  for (int i = 1; i < warps; ++i) sum += of_warp[i][lane];
  to[c] = sum;
}

inline void add_column_sums(const float* partial, ColumnSums out, int sums, int64_t programs,
                            int64_t N, cudaStream_t stream) {
  constexpr int kMostWarps = 32;
  const auto warps = static_cast<unsigned>(programs < kMostWarps ? programs : kMostWarps);
  LAUNCH(column_sums_kernel<kMostWarps>, dim3(grid_of(ceil_div(N, int64_t{32})), sums),
         dim3(32, warps), 0, stream, partial, out, programs, N);
}

}  // namespace gptfast::cuda
