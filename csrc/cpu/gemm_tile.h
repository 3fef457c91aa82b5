// Small fp32 matrix products between buffers that sit in the first- and second-level cache: the
// building block of attention. C (M x N) = or += A (M x K) B (K x N).
//
// A is read one scalar at a time and may be transposed (any two strides); the rows of B and C are
// contiguous and N is a multiple of W. A tile of kRows x kVectors vectors of C stays in registers
// while k runs: with 24 (AVX-512) or 12 independent sums, the latency of the fused multiply-add is
// hidden, and each loaded vector of B is used kRows times.
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = GPTFAST_VECTOR_BYTES == 64 ? 4 : 2;  // 32 registers, otherwise 16

struct Matrix {  // element (i, k) is data[i * stride_row + k * stride_col]
  const float* data;
  int64_t stride_row, stride_col;
};

template <int ROWS, int VECTORS>
inline void gemm_tile(Matrix A, const float* B, int64_t stride_b, float* C, int64_t stride_c,
                      int64_t K, bool accumulate) {
  f32v acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j)
      acc[i][j] = accumulate ? load(C + i * stride_c + j * W) : f32v{};
  for (int64_t k = 0; k < K; ++k) {
    f32v b[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) b[j] = load(B + k * stride_b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const f32v a = set1(A.data[i * A.stride_row + k * A.stride_col]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(C + i * stride_c + j * W, acc[i][j]);
}

// All rows of A against VECTORS vectors of columns.
template <int VECTORS>
inline void gemm_columns(int64_t M, Matrix A, const float* B, int64_t stride_b, float* C,
                         int64_t stride_c, int64_t K, bool accumulate) {
  int64_t i = 0;
  auto tile = [&](auto rows) {
    const Matrix from_i{A.data + i * A.stride_row, A.stride_row, A.stride_col};
    gemm_tile<decltype(rows)::value, VECTORS>(from_i, B, stride_b, C + i * stride_c, stride_c, K,
                                              accumulate);
    i += decltype(rows)::value;
  };
  while (i + kTileRows <= M) tile(std::integral_constant<int, kTileRows>{});
  while (i + 2 <= M) tile(std::integral_constant<int, 2>{});
  if (i < M) tile(std::integral_constant<int, 1>{});
}

inline void gemm(int64_t M, int64_t N, int64_t K, Matrix A, const float* B, int64_t stride_b,
                 float* C, int64_t stride_c, bool accumulate) {
  int64_t j = 0;
  for (; j + kTileVectors * W <= N; j += kTileVectors * W)
    gemm_columns<kTileVectors>(M, A, B + j, stride_b, C + j, stride_c, K, accumulate);
  for (; j < N; j += W) gemm_columns<1>(M, A, B + j, stride_b, C + j, stride_c, K, accumulate);
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
