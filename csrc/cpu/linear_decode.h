// Products of a few rows with a large matrix, y = x W^T, as decoding needs them: what bounds them is
// the reading of W, once, in the order in which it lies in memory.
//
// Work is cut into panels of 16 output channels. W is stored
//   fp32, bf16, fp16  (N, K), a row for each channel, as in torch.nn.Linear
//   int8              (N / 16, K / 4, 16, 4), K filled up to a multiple of 64
//   int4              (N / 16, K / 8, 16, 4), K filled up to a multiple of 32: byte b of the last
//                     dimension holds the weights 8 i + b (low four bits) and 8 i + 4 + b
// so that a vector of 32-bit lanes has a channel in each lane, and 16 lanes are what AMX's int8
// products take as an operand.
//
// Every level multiplies in fp32 with the weights as they are stored. Where there is AMX, quantised
// weights meet x in exact integer products: each row of x is rounded to 24 bits of fixed point, in
// three signed bytes,
//   x_k = s (65536 d0_k + 256 d1_k + d2_k) + error,  |error| <= 2^-24 max_k |x_k|
// and so is a matrix of three rows of int8. More than 500 lines: five formats of W, and for two of them
// a second way to multiply.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int kPanel = 16;  // output channels
constexpr int kGroup = 32;  // weights of one int4 scale
constexpr int kRows = 16;   // rows of x that are multiplied in one pass over a panel
constexpr int kDigits = 3;

enum class WeightFormat : int { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

struct Weight {
  const void* data;
  const void* scale;    // int8: fp32 (N); int4: bf16 (N / 16, K / 32, 16)
  const uint8_t* zero;  // int4: (N / 16, K / 32, 16), or null, which means 8
  int64_t N, K;
  WeightFormat format;

  bool quantised() const { return format >= WeightFormat::INT8; }
  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
  int64_t channels(int64_t panel) const { return std::min<int64_t>(kPanel, N - panel * kPanel); }
  int64_t padded_k() const { return padded_k(K); }
  static int64_t padded_k(int64_t K) { return (K + 63) / 64 * 64; }
  int64_t groups() const { return (K + kGroup - 1) / kGroup; }
  int64_t panel_bytes() const {
    switch (format) {
      case WeightFormat::F32: return kPanel * K * 4;
      case WeightFormat::INT8: return kPanel * padded_k();
      case WeightFormat::INT4: return kPanel * kGroup / 2 * groups();
      default: return kPanel * K * 2;
    }
  }
};

// One panel's results: a row of 16 channels for each row of x.
typedef float PanelSums[kRows][kPanel];

// Up to 16 rows of x in the forms that the kernels read, in a buffer of floats() floats.
struct RowsOfX {
  float* x;        // (M, padded K), zeros behind K
  float* scale;    // (M) s; NaN where there are no digits
  float* sums;     // (M, 3, groups) sum of the digits in each group
  int8_t* digits;  // (M, 3, padded K)
  int64_t M, K;

  static int64_t floats(int64_t K) {
    const int64_t Kp = Weight::padded_k(K);
    return kRows * (Kp + 16 + kDigits * (Kp / kGroup) + kDigits * Kp / 4) + 64;
  }
  RowsOfX(float* buffer, int64_t M, int64_t K) : M(M), K(K) {
    const int64_t Kp = Weight::padded_k(K);
    x = buffer;
    digits = reinterpret_cast<int8_t*>(x + kRows * Kp);
    sums = reinterpret_cast<float*>(digits + kRows * kDigits * Kp);
    scale = sums + kRows * kDigits * (Kp / kGroup);
  }
  int64_t stride() const { return Weight::padded_k(K); }
  int64_t groups() const { return stride() / kGroup; }
};

// ---- Weights in fp32, bf16, fp16: a dot product a channel --------------------------------------

// The rows of a tile are one stretch of memory, but the processor sees short streams. Asking for as
// many bytes as a step reads, this far ahead, reads bf16 at 29 GB/s where it was 19.
constexpr int kBytesAhead = 8192;
template <int BYTES>
inline void prefetch(const void* p) {
  for (int i = 0; i < BYTES; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + kBytesAhead + i, 0, 2);
}

template <int ROWS, int CHANNELS, class T>
inline void dot_tile(const T* w, int64_t K, const float* x, int64_t stride_x, float* y) {
  f32v acc[ROWS][CHANNELS] = {};
  auto step = [&](int64_t k, auto part) {
    prefetch<CHANNELS * W * sizeof(T)>(w + CHANNELS * k);
    f32v weights[CHANNELS];
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) weights[c] = part.load(w + c * K + k);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const f32v row = load(x + m * stride_x + k);
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) acc[m][c] += row * weights[c];
    }
  };
  for_each_vector(K, step);
  for (int m = 0; m < ROWS; ++m)
    for (int c = 0; c < CHANNELS; ++c) y[m * kPanel + c] = reduce_add(acc[m][c]);
}

template <int CHANNELS, class T>
inline void dot_rows(const T* w, const RowsOfX& rows, float* y) {
  int64_t m = 0;
  auto tile = [&](auto count) {
    dot_tile<decltype(count)::value, CHANNELS>(w, rows.K, rows.x + m * rows.stride(), rows.stride(),
                                               y + m * kPanel);
    m += decltype(count)::value;
  };
  while (m + 4 <= rows.M) tile(std::integral_constant<int, 4>{});
  if (m + 2 <= rows.M) tile(std::integral_constant<int, 2>{});
  if (m < rows.M) tile(std::integral_constant<int, 1>{});
}

template <class T>
inline void float_panel(const Weight& w, int64_t panel, const RowsOfX& rows, PanelSums& y) {
  const T* from = static_cast<const T*>(w.data) + panel * kPanel * w.K;
  const int64_t channels = w.channels(panel);
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) dot_rows<4>(from + c * w.K, rows, &y[0][c]);
  for (; c < channels; ++c) dot_rows<1>(from + c * w.K, rows, &y[0][c]);
}

// ---- Quantised weights in fp32: a channel in each lane -----------------------------------------

constexpr int kParts = kPanel / W;  // vectors across a panel

template <int ROWS>
struct PanelAccumulator {
  f32v at[ROWS][kParts] = {};

  void add(f32v weight, int part, const float* x, int64_t stride_x) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) at[m][part] += weight * x[m * stride_x];
  }
};

inline f32v to_float(u32v v) { return __builtin_convertvector(bit_cast<i32v>(v), f32v); }

inline u32v load_lanes(const uint8_t* p) {
  u32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline f32v load_zero(const uint8_t* zero) {
  if (!zero) return set1(8.0f);
  f32v z;
  for (int i = 0; i < W; ++i) z[i] = zero[i];
  return z;
}

template <int ROWS>
inline void int8_tile(const uint8_t* w, int64_t K, const float* scale, int64_t channels,
                      const float* x, int64_t stride_x, float* y) {
  PanelAccumulator<ROWS> acc;
  for (int64_t k = 0; k < K; k += 4, w += 4 * kPanel)
    for (int part = 0; part < kParts; ++part) {
      const u32v lanes = load_lanes(w + part * W * 4);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const i32v value = bit_cast<i32v>(lanes << (24 - 8 * i)) >> 24;
        acc.add(__builtin_convertvector(value, f32v), part, x + k + i, stride_x);
      }
    }
  for (int part = 0; part < kParts; ++part) {
    const int64_t left = std::clamp<int64_t>(channels - part * W, 0, W);
    const f32v s = load_n(scale + (left ? part * W : 0), left);
    for (int m = 0; m < ROWS; ++m) store(y + m * kPanel + part * W, acc.at[m][part] * s);
  }
}

template <int ROWS>
inline void int4_tile(const uint8_t* w, int64_t groups, const bf16* scale, const uint8_t* zero,
                      const float* x, int64_t stride_x, float* y) {
  PanelAccumulator<ROWS> total;
  for (int64_t g = 0; g < groups; ++g, w += kPanel * kGroup / 2)
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = g * kPanel + part * W;
      const f32v z = load_zero(zero ? zero + at : nullptr);
      PanelAccumulator<ROWS> acc;
      for (int i = 0; i < kGroup / 8; ++i) {
        const u32v lanes = load_lanes(w + i * 4 * kPanel + part * W * 4);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          const u32v value = (lanes >> (j < 4 ? 8 * j : 8 * (j - 4) + 4)) & 15;
          acc.add(to_float(value) - z, 0, x + g * kGroup + 8 * i + j, stride_x);
        }
      }
      const f32v s = load(scale + at);
      for (int m = 0; m < ROWS; ++m) total.at[m][part] += s * acc.at[m][0];
    }
  for (int part = 0; part < kParts; ++part)
    for (int m = 0; m < ROWS; ++m) store(y + m * kPanel + part * W, total.at[m][part]);
}

inline void quantised_panel(const Weight& w, int64_t panel, const RowsOfX& rows, PanelSums& y) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * w.panel_bytes();
  const int64_t group = panel * kPanel * w.groups();
  int64_t m = 0;
  auto tile = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    const float* x = rows.x + m * rows.stride();
    if (w.format == WeightFormat::INT8)
      int8_tile<kCount>(data, w.padded_k(), static_cast<const float*>(w.scale) + panel * kPanel,
                        w.channels(panel), x, rows.stride(), y[m]);
    else
      int4_tile<kCount>(data, w.groups(), static_cast<const bf16*>(w.scale) + group,
                        w.zero ? w.zero + group : nullptr, x, rows.stride(), y[m]);
    m += kCount;
  };
  while (m + 4 <= rows.M) tile(std::integral_constant<int, 4>{});
  while (m < rows.M) tile(std::integral_constant<int, 1>{});
}

// ---- Quantised weights in integers -------------------------------------------------------------
#if defined(__AMX_INT8__)

// Row m of x in digits, its scale and its sums. The scale is NaN where that cannot be done: the row
// is not finite, or tiny, or too long.
inline void make_digits(const RowsOfX& rows, int64_t m) {
  constexpr float kLargest = 127 * 65536;  // digits reach 32639 more, so that it may be rounded up
  constexpr int64_t kLongest = 65536;      // products 255 x 128 that can be added up in 31 bits
  constexpr float kTiny = 0x1p-100f;       // kLargest / max must not overflow
  const int64_t Kp = rows.stride(), groups = rows.groups();
  const float* x = rows.x + m * Kp;
  f32v largest{}, invalid{};
  for (int64_t k = 0; k < Kp; k += W) {
    const f32v v = load(x + k);
    largest = max(abs(v), largest);
    invalid += v * 0.0f;  // NaN where v is NaN or infinite
  }
  const float top = reduce_max(largest);
  const bool representable = reduce_add(invalid) == 0 && (top == 0 || top >= kTiny);
  rows.scale[m] = representable && rows.K <= kLongest ? top / kLargest : NAN;
  if (std::isnan(rows.scale[m])) return;
  const float inverse = top == 0 ? 0.0f : kLargest / top;
  int8_t* digits = rows.digits + m * kDigits * Kp;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i sum[kDigits] = {};
    for (int64_t k = g * kGroup; k < (g + 1) * kGroup; k += W) {
      __m512i q = _mm512_cvtps_epi32(load(x + k) * inverse);
#pragma GCC unroll 3
      for (int d = kDigits - 1; d >= 0; --d) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
        _mm_store_si128(reinterpret_cast<__m128i*>(digits + d * Kp + k),
                        _mm512_cvtepi32_epi8(digit));
        q = _mm512_srai_epi32(_mm512_sub_epi32(q, digit), 8);
        sum[d] = _mm512_add_epi32(sum[d], digit);
      }
    }
    for (int d = 0; d < kDigits; ++d)
      rows.sums[(m * kDigits + d) * groups + g] =
          static_cast<float>(_mm512_reduce_add_epi32(sum[d]));
  }
}

// Whether all rows have digits.
inline bool have_digits(const RowsOfX& rows) {
  for (int64_t m = 0; m < rows.M; ++m)
    if (std::isnan(rows.scale[m])) return false;
  return true;
}

// 65536 d0 + 256 d1 + d2
inline f32v join_digits(f32v d0, f32v d1, f32v d2) { return d0 * 65536.0f + (d1 * 256.0f + d2); }
inline f32v as_float(__m512i v) { return _mm512_cvtepi32_ps(v); }

inline __m512i broadcast4(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return _mm512_set1_epi32(bytes);
}

// One row of x, with VNNI. Weights are the operand without a sign: 128 + w, which adds 128 times the
// sum of the digits.
inline void int8_row(const uint8_t* w, const float* scale, int64_t channels, const RowsOfX& rows,
                     int64_t m, float* y) {
  constexpr int kChains = 4;  // sums in flight: the product has a latency of five cycles
  const int64_t Kp = rows.stride();
  const int8_t* digits = rows.digits + m * kDigits * Kp;
  __m512i acc[kChains][kDigits] = {};
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t k = 0; k < Kp; k += 4 * kChains, w += 4 * kChains * kPanel)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(w + i * 64), sign);
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d)
        acc[i][d] =
            _mm512_dpbusd_epi32(acc[i][d], weights, broadcast4(digits + d * Kp + k + 4 * i));
    }
  f32v value[kDigits];
  for (int d = 0; d < kDigits; ++d) {
    float sum = 0;
    for (int64_t g = 0; g < rows.groups(); ++g)
      sum += rows.sums[(m * kDigits + d) * rows.groups() + g];
    const __m512i pair0 = _mm512_add_epi32(acc[0][d], acc[1][d]);
    const __m512i pair1 = _mm512_add_epi32(acc[2][d], acc[3][d]);
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(sum) * 128);
    value[d] = as_float(_mm512_sub_epi32(_mm512_add_epi32(pair0, pair1), offset));
  }
  const f32v s = load_n(scale, channels) * rows.scale[m];
  store(y, join_digits(value[0], value[1], value[2]) * s);
}

inline f32v zero_points(const uint8_t* zero) {
  if (!zero) return set1(8.0f);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero));
  return as_float(_mm512_cvtepu8_epi32(bytes));
}

// sum_k d_k (w_k - z) of a group from sum_k d_k w_k: exact, as every number is below 2^24.
inline f32v centre(__m512i product, f32v z, float sum) { return as_float(product) - z * sum; }

inline void int4_row(const uint8_t* w, int64_t groups, const bf16* scale, const uint8_t* zero,
                     const RowsOfX& rows, int64_t m, float* y) {
  const int64_t Kp = rows.stride();
  const int8_t* digits = rows.digits + m * kDigits * Kp;
  const float* sums = rows.sums + m * kDigits * rows.groups();
  const __m512i low = _mm512_set1_epi8(15);
  f32v total{};
  for (int64_t g = 0; g < groups; ++g, w += kPanel * kGroup / 2) {
    __m512i acc[2][kDigits] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup / 8; ++i) {
      const __m512i bytes = _mm512_loadu_si512(w + i * 64);
      const __m512i halves[2] = {_mm512_and_si512(bytes, low),
                                 _mm512_and_si512(_mm512_srli_epi32(bytes, 4), low)};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d)
          acc[h][d] = _mm512_dpbusd_epi32(acc[h][d], halves[h],
                                          broadcast4(digits + d * Kp + g * kGroup + 8 * i + 4 * h));
    }
    const f32v z = zero_points(zero ? zero + g * kPanel : nullptr);
    f32v value[kDigits];
#pragma GCC unroll 3
    for (int d = 0; d < kDigits; ++d)
      value[d] = centre(_mm512_add_epi32(acc[0][d], acc[1][d]), z, sums[d * rows.groups() + g]);
    total += join_digits(value[0], value[1], value[2]) * load(scale + g * kPanel);
  }
  store(y, total * rows.scale[m]);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Configures this thread's tiles while it lives: 0 to 2 products and 3 to 5 digits of x, 16 rows
// each and what is left, 6 a block of weights `depth` deep.
class DigitTiles {
 public:
  DigitTiles(int64_t M, int depth) : count_(static_cast<int>((M * kDigits + 15) / 16)) {
    TileConfig config;
    for (int i = 0; i < count_; ++i) {
      const auto rows = static_cast<uint8_t>(std::min<int64_t>(M * kDigits - i * 16, 16));
      config.rows[i] = config.rows[3 + i] = rows;
      config.bytes_per_row[i] = 64;
      config.bytes_per_row[3 + i] = static_cast<uint16_t>(depth);
    }
    config.rows[6] = static_cast<uint8_t>(depth / 4);
    config.bytes_per_row[6] = 64;
    // gcc may drop the stores that fill the configuration, as it does not see that it is read.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~DigitTiles() { _tile_release(); }
  DigitTiles(const DigitTiles&) = delete;
  DigitTiles& operator=(const DigitTiles&) = delete;

  void clear() const {
    _tile_zero(0);
    if (count_ > 1) _tile_zero(1);
    if (count_ > 2) _tile_zero(2);
  }
  // products += digits of x from `at` on, times the weights
  void add(const RowsOfX& rows, int64_t at, const void* weights) const {
    const int64_t Kp = rows.stride();
    const int8_t* digits = rows.digits + at;
    asm volatile("" ::: "memory");  // gcc does not see that tiles are loaded from memory
    _tile_loadd(6, weights, 64);
    _tile_loadd(3, digits, Kp);
    _tile_dpbssd(0, 3, 6);
    if (count_ > 1) {
      _tile_loadd(4, digits + 16 * Kp, Kp);
      _tile_dpbssd(1, 4, 6);
    }
    if (count_ > 2) {
      _tile_loadd(5, digits + 32 * Kp, Kp);
      _tile_dpbssd(2, 5, 6);
    }
  }
  void store(int32_t (*to)[kPanel]) const {
    _tile_stored(0, to, 64);
    if (count_ > 1) _tile_stored(1, to + 16, 64);
    if (count_ > 2) _tile_stored(2, to + 32, 64);
  }

 private:
  int count_;
};

inline void int8_panel_amx(const uint8_t* w, const float* scale, int64_t channels,
                           const RowsOfX& rows, PanelSums& y) {
  alignas(64) int32_t products[kRows * kDigits][kPanel];
  const DigitTiles tiles(rows.M, 64);
  tiles.clear();
  for (int64_t k = 0; k < rows.stride(); k += 64) tiles.add(rows, k, w + k * kPanel);
  tiles.store(products);
  const f32v s = load_n(scale, channels);
  for (int64_t m = 0; m < rows.M; ++m) {
    const int32_t (*of_row)[kPanel] = products + m * kDigits;
    f32v value[kDigits];
    for (int d = 0; d < kDigits; ++d) value[d] = as_float(_mm512_load_si512(of_row[d]));
    store(y[m], join_digits(value[0], value[1], value[2]) * (s * rows.scale[m]));
  }
}

inline void int4_panel_amx(const uint8_t* w, int64_t groups, const bf16* scale, const uint8_t* zero,
                           const RowsOfX& rows, PanelSums& y) {
  alignas(64) int32_t products[2][kRows * kDigits][kPanel];
  alignas(64) uint8_t weights[2][kGroup * kPanel];
  const DigitTiles tiles(rows.M, kGroup);
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t m = 0; m < rows.M; ++m) store(y[m], f32v{});
  auto finish = [&](int64_t g) {  // of a group that is done
    const f32v z = zero_points(zero ? zero + g * kPanel : nullptr), s = load(scale + g * kPanel);
    for (int64_t m = 0; m < rows.M; ++m) {
      f32v value[kDigits];
      for (int d = 0; d < kDigits; ++d)
        value[d] = centre(_mm512_load_si512(products[g % 2][m * kDigits + d]), z,
                          rows.sums[(m * kDigits + d) * rows.groups() + g]);
      store(y[m], load(y[m]) + join_digits(value[0], value[1], value[2]) * s);
    }
  };
  for (int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kGroup / 8; ++i) {
      const __m512i bytes = _mm512_loadu_si512(w + (g * (kGroup / 8) + i) * 64);
      uint8_t* to = weights[g % 2] + i * 128;
      _mm512_store_si512(to, _mm512_and_si512(bytes, low));
      _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi32(bytes, 4), low));
    }
    tiles.clear();
    tiles.add(rows, g * kGroup, weights[g % 2]);
    tiles.store(products[g % 2]);
    if (g) finish(g - 1);
  }
  if (groups) finish(groups - 1);
  for (int64_t m = 0; m < rows.M; ++m) store(y[m], load(y[m]) * rows.scale[m]);
}

inline void integer_panel(const Weight& w, int64_t panel, const RowsOfX& rows, PanelSums& y) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * w.panel_bytes();
  const int64_t group = panel * kPanel * w.groups();
  const auto* scale8 = static_cast<const float*>(w.scale) + panel * kPanel;
  const auto* scale4 = static_cast<const bf16*>(w.scale) + group;
  const uint8_t* zero = w.zero ? w.zero + group : nullptr;
  // Tiles from as many rows on as they were seen to be faster.
  if (w.format == WeightFormat::INT8) {
    if (rows.M > 1) return int8_panel_amx(data, scale8, w.channels(panel), rows, y);
    return int8_row(data, scale8, w.channels(panel), rows, 0, y[0]);
  }
  if (rows.M > 4) return int4_panel_amx(data, w.groups(), scale4, zero, rows, y);
  for (int64_t m = 0; m < rows.M; ++m) int4_row(data, w.groups(), scale4, zero, rows, m, y[m]);
}

#else

inline void make_digits(const RowsOfX&, int64_t) {}
inline bool have_digits(const RowsOfX&) { return false; }
inline void integer_panel(const Weight&, int64_t, const RowsOfX&, PanelSums&) {}

#endif

// ---- All formats -------------------------------------------------------------------------------

enum class Activation : int { NONE = 0, GELU_TANH = 1 };

inline f32v activate(f32v z, Activation activation) {
  if (activation == Activation::NONE) return z;
  const f32v two_u = 1.5957691216057308f * (z + 0.044715f * z * z * z);  // 2 sqrt(2 / pi) ( ... )
  return z / (1.0f + exp(-two_u));
}

// Fills in what the kernels of `w` read, from the K values in row m of rows.x.
inline void prepare_row(const Weight& w, const RowsOfX& rows, int64_t m) {
  float* row = rows.x + m * rows.stride();
  std::fill(row + rows.K, row + rows.stride(), 0.0f);
  if (w.quantised()) make_digits(rows, m);
}

// y[m][c] = sum_k x[m][k] W[16 panel + c][k], for the channels that there are.
inline void panel_product(const Weight& w, int64_t panel, const RowsOfX& rows, PanelSums& y) {
  switch (w.format) {
    case WeightFormat::F32: return float_panel<float>(w, panel, rows, y);
    case WeightFormat::BF16: return float_panel<bf16>(w, panel, rows, y);
    case WeightFormat::F16: return float_panel<f16>(w, panel, rows, y);
    default: break;
  }
  have_digits(rows) ? integer_panel(w, panel, rows, y) : quantised_panel(w, panel, rows, y);
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
