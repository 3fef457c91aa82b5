// The vector layer: fp32 vectors of one machine register, loads and stores that convert from and to
// bf16 and fp16, and the few transcendental functions that the kernels need.
//
// Every file of csrc/cpu/ is compiled once per instruction set with GPTFAST_ISA (a namespace name)
// and GPTFAST_VECTOR_BYTES set by setup.py. Arithmetic is written with the compiler's vector
// extensions (`a * b + c` contracts to a fused multiply-add where there is one), so the same text
// serves SSE2, AVX2, AVX-512 and NEON; intrinsics appear only where the compiler finds no single
// instruction by itself.
//
// exp is accurate to 2 ulp over its whole range (measured by tests/test_simd.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#ifndef GPTFAST_ISA
#error "compile with -DGPTFAST_ISA=<name> -DGPTFAST_VECTOR_BYTES=<16|32|64>"
#endif

// For arithmetic on vectors: compilers stop inlining in large files, and a call costs as much as most
// of these do, since the caller has to save its vectors and to load its constants anew.
#define GPTFAST_INLINE [[gnu::always_inline]] inline

namespace gptfast::GPTFAST_ISA {
namespace {  // internal linkage: the linker must never merge code compiled for different levels

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int W = GPTFAST_VECTOR_BYTES / 4;  // fp32 lanes in a vector

typedef float f32v __attribute__((vector_size(W * 4)));
typedef int32_t i32v __attribute__((vector_size(W * 4)));
typedef uint32_t u32v __attribute__((vector_size(W * 4)));
typedef uint16_t u16v __attribute__((vector_size(W * 2)));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

GPTFAST_INLINE f32v set1(float x) { return x - f32v{}; }
GPTFAST_INLINE i32v set1_i32(int32_t x) { return x - i32v{}; }
GPTFAST_INLINE u32v set1_u32(uint32_t x) { return x - u32v{}; }

GPTFAST_INLINE i32v lane_index() {  // 0, 1, ... W - 1
  i32v lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}

GPTFAST_INLINE f32v lane_numbers() { return __builtin_convertvector(lane_index(), f32v); }

// mask lanes are 0 or -1, as comparisons of vectors yield them
GPTFAST_INLINE f32v select(i32v mask, f32v if_true, f32v if_false) {
  return mask ? if_true : if_false;
}

// max/min return b where a is NaN: softmax still sees the NaN, in its sum.
GPTFAST_INLINE f32v max(f32v a, f32v b) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif GPTFAST_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
GPTFAST_INLINE f32v min(f32v a, f32v b) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_min_ps(a, b);
#elif GPTFAST_VECTOR_BYTES == 32
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
GPTFAST_INLINE f32v sqrt(f32v x) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_sqrt_ps(x);
#elif GPTFAST_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
GPTFAST_INLINE f32v abs(f32v x) { return bit_cast<f32v>(bit_cast<i32v>(x) & set1_i32(0x7fffffff)); }

GPTFAST_INLINE float reduce_add(f32v v) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps(v);
#else
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
#endif
}
// The sums of four vectors, to out[0] to out[3].
GPTFAST_INLINE void reduce_add_4(const f32v (&v)[4], float* out) {
#if GPTFAST_VECTOR_BYTES == 64
  const f32v ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const f32v cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  const f32v abcd = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) +
                    _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));  // in each fourth of the vector
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int k = 0; k < 4; ++k) out[k] = reduce_add(v[k]);
#endif
}
GPTFAST_INLINE float reduce_max(f32v v) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// ---- Conversions -------------------------------------------------------------------------------

// gcc 12 takes __builtin_convertvector apart where one instruction would do.
GPTFAST_INLINE u32v widen(u16v h) {
#if GPTFAST_VECTOR_BYTES == 64
  return bit_cast<u32v>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)));
#elif GPTFAST_VECTOR_BYTES == 32
  return bit_cast<u32v>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, u32v);
#endif
}
GPTFAST_INLINE u16v narrow(u32v v) {  // the low halves
#if GPTFAST_VECTOR_BYTES == 64
  return bit_cast<u16v>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, u16v);
#endif
}

GPTFAST_INLINE f32v from_bits(u16v h, bf16) { return bit_cast<f32v>(widen(h) << 16); }
GPTFAST_INLINE u16v to_bits(f32v v, bf16) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__) && GPTFAST_VECTOR_BYTES == 64
  return bit_cast<u16v>(_mm512_cvtneps_pbh(v));
#else
  const u32v u = bit_cast<u32v>(v);
  const u32v rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const u32v quiet = (u >> 16) | 0x40;
  return narrow((v == v) ? rounded : quiet);
#endif
}

GPTFAST_INLINE f32v from_bits(u16v h, f16) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_cvtph_ps(bit_cast<__m256i>(h));
#elif GPTFAST_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(bit_cast<__m128i>(h));
#else
  // Move exponent and mantissa into place and rescale by 2^112; infinity and NaN get exponent 255.
  const u32v u = __builtin_convertvector(h, u32v);
  const u32v shifted = (u & 0x7fff) << 13;
  const u32v scaled = bit_cast<u32v>(bit_cast<f32v>(shifted) * set1(0x1p112f));
  const u32v special = shifted | 0x7f800000;
  const u32v magnitude = (u & 0x7c00) == 0x7c00 ? special : scaled;
  return bit_cast<f32v>(magnitude | ((u & 0x8000) << 16));
#endif
}
GPTFAST_INLINE u16v to_bits(f32v v, f16) {
#if GPTFAST_VECTOR_BYTES == 64
  return bit_cast<u16v>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif GPTFAST_VECTOR_BYTES == 32
  return bit_cast<u16v>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const u32v u = bit_cast<u32v>(v);
  const u32v magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the fp32 adder round at the right bit.
  const u32v subnormal = bit_cast<u32v>(bit_cast<f32v>(magnitude) + set1(0.5f)) - 0x3f000000;
  const u32v normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  u32v half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? set1_u32(0x7c00) : half;
  half = magnitude > 0x7f800000 ? set1_u32(0x7e00) : half;
  return __builtin_convertvector(half | sign, u16v);
#endif
}

// The nearest value that a storage type holds.
GPTFAST_INLINE f32v round_to(f32v v, float) { return v; }
template <class T>
GPTFAST_INLINE f32v round_to(f32v v, T) {
  return from_bits(to_bits(v, T{}), T{});
}

// ---- Loads and stores: unaligned, and of the first n lanes only (the rest read as zero) --------

GPTFAST_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
GPTFAST_INLINE f32v load(const T* p) {
  u16v h;
  std::memcpy(&h, p, sizeof h);
  return from_bits(h, T{});
}
GPTFAST_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
template <class T>
GPTFAST_INLINE void store(T* p, f32v v) {
  const u16v h = to_bits(v, T{});
  std::memcpy(p, &h, sizeof h);
}
#if GPTFAST_VECTOR_BYTES == 64
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
GPTFAST_INLINE f32v load_n(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
GPTFAST_INLINE void store_n(float* p, f32v v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
template <class T>
GPTFAST_INLINE f32v load_n(const T* p, int64_t n) {
  return from_bits(bit_cast<u16v>(_mm256_maskz_loadu_epi16(first_lanes(n), p)), T{});
}
template <class T>
GPTFAST_INLINE void store_n(T* p, f32v v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), bit_cast<__m256i>(to_bits(v, T{})));
}
#else
template <class T>
GPTFAST_INLINE f32v load_n(const T* p, int64_t n) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
GPTFAST_INLINE void store_n(T* p, f32v v, int64_t n) {
  T lanes[W];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
#endif

// Calls body(i, load, store) for every vector of [0, n): whole vectors first, then the tail.
// `load(p)` reads lanes of p + i, `store(p, v)` writes them; in the tail only the live ones.
struct Whole {
  template <class T>
  f32v load(const T* p) const {
    return GPTFAST_ISA::load(p);
  }
  template <class T>
  void store(T* p, f32v v) const {
    GPTFAST_ISA::store(p, v);
  }
  // lanes that do not exist take `other`
  f32v live(f32v v, f32v) const { return v; }
};
struct Tail {
  int64_t n;
  template <class T>
  f32v load(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  void store(T* p, f32v v) const {
    store_n(p, v, n);
  }
  f32v live(f32v v, f32v other) const {
    return select(lane_index() < static_cast<int32_t>(n), v, other);
  }
};
template <class Body>
inline void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Tail{n - i});
}

// Adds term(j, part, sums) over all vectors of [0, n), where sums are K vectors that it adds to. Four
// sets of them take turns, so that additions do not wait for each other.
template <int K, class Term>
inline void sum_vectors(int64_t n, float (&totals)[K], Term&& term) {
  f32v a[K]{}, b[K]{}, c[K]{}, d[K]{};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    term(j, Whole{}, a);
    term(j + W, Whole{}, b);
    term(j + 2 * W, Whole{}, c);
    term(j + 3 * W, Whole{}, d);
  }
  for (; j + W <= n; j += W) term(j, Whole{}, a);
  if (j < n) term(j, Tail{n - j}, b);
  for (int k = 0; k < K; ++k) totals[k] = reduce_add((a[k] + b[k]) + (c[k] + d[k]));
}

// 1 / x to 2 ulp, for 2^-126 <= |x| <= 2^126 and NaN: the divider takes twice as long.
GPTFAST_INLINE f32v reciprocal(f32v x) {
#if GPTFAST_VECTOR_BYTES == 64
  const f32v y = _mm512_rcp14_ps(x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}
// a / x to 1 ulp, for a and x from 2^-20 to 2^20, a of 0, and NaN.
GPTFAST_INLINE f32v quotient(f32v a, f32v x) {
#if GPTFAST_VECTOR_BYTES == 64
  const f32v y = reciprocal(x), q = a * y;
  return y * (a - q * x) + q;
#else
  return a / x;
#endif
}

// ---- exp, erfc, tanh ----------------------------------------------------------------------------
// Polynomials fitted for the least relative error (Lawson-weighted least squares in fp64).

// 2^n for integral n in [-126, 127]
GPTFAST_INLINE f32v exp2_int(i32v n) { return bit_cast<f32v>((n + 127) << 23); }

// exp(r) of x = n ln2 + r with |r| <= ln2 / 2.
GPTFAST_INLINE f32v exp_of_rest(f32v x, f32v n) {
  f32v r = n * -0.693359375f + x;  // ln2 in two parts, the first one exact
  r = n * 2.12194440e-4f + r;
  f32v q = r * 1.381446475e-3f + 8.368780622e-3f;
  q = q * r + 4.166839426e-2f;
  q = q * r + 1.666652011e-1f;
  q = q * r + 4.999999341e-1f;
  q = q * r + 1.0f;
  return q * r + 1.0f;
}

// exp(x) to 2 ulp for |x| <= 87 and NaN: half of the price of the other one.
GPTFAST_INLINE f32v exp_to_87(f32v x) {
  const f32v shift = set1(0x1.8p23f + 127);  // adding it leaves the biased exponent in the low bits
  const f32v t = x * 1.44269504f + shift;
  return exp_of_rest(x, t - shift) * bit_cast<f32v>(bit_cast<u32v>(t) << 23);
}

// exp(x), to 2 ulp. Results below the smallest normal number are flushed to zero; NaN and
// infinities as in libm.
GPTFAST_INLINE f32v exp(f32v x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;
  const f32v shift = set1(0x1.8p23f);  // adding it rounds to an integer, left in the low bits
  const f32v clamped = min(max(x, set1(kLowest)), set1(kHighest));
  const f32v t = clamped * 1.44269504f + shift;
  const f32v p = exp_of_rest(clamped, t - shift);
  const i32v ni = bit_cast<i32v>(t) - bit_cast<i32v>(shift);
  const i32v half = ni >> 1;  // two factors, since 2^128 is no float
  f32v y = p * exp2_int(half) * exp2_int(ni - half);
  y = select(x < kLowest, f32v{}, y);
  y = select(x > kHighest, set1(INFINITY), y);
  return select(x == x, y, x);
}

constexpr float kLog2E = 1.4426950408889634f;  // exp(x) = exp2(x kLog2E)

// 2^x for x < 127.5, to 3 ulp: cheaper than exp, without the care for the ends of the range. Results
// below 2^-126 may be zero; NaN stays NaN. The polynomial for 2^r, |r| <= 1/2, errs by 2^-23.4.
GPTFAST_INLINE f32v exp2(f32v x) {
  const f32v shift = set1(0x1.8p23f + 127);  // adding it leaves the biased exponent in the low bits
  x = max(set1(-127.0f), x);
  const f32v t = x + shift;
  const f32v r = x - (t - shift);
  f32v p = r * 1.326472725e-3f + 9.671512688e-3f;
  p = p * r + 5.550733744e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  return (p * r + 1.0f) * bit_cast<f32v>(bit_cast<u32v>(t) << 23);
}

// erfc(z) for 0 <= z < 2^126: e t P(t) with e = exp(-z^2) and t = 1 / (1 + 0.4 z).
GPTFAST_INLINE f32v erfc_nonnegative(f32v z, f32v e) {
  const f32v t = reciprocal(1.0f + 0.4f * z);
  f32v p = t * -3.059556352e-02f + 2.034763795e-01f;
  p = p * t - 5.117258100e-01f;
  p = p * t + 5.647598426e-01f;
  p = p * t - 2.988717371e-01f;
  p = p * t + 2.799106741e-01f;
  p = p * t + 1.269447636e-01f;
  p = p * t + 2.155107445e-01f;
  p = p * t + 2.248800578e-01f;
  p = p * t + 2.257106552e-01f;
  return e * t * p;
}

// tanh(y): (1 - e) / (1 + e) with e = exp(-2 |y|); below 1/2, where 1 - e cancels, y + y^3 q(y^2).
// Also its slope, 1 / cosh(y)^2, which 1 - tanh(y)^2 would lose to cancellation.
GPTFAST_INLINE f32v tanh(f32v y, f32v* slope) {
  const f32v power = exp_to_87(max(set1(-87.0f), -2.0f * abs(y)));
  const f32v e = select(abs(y) > 43.5f, f32v{}, power);
  const f32v r = reciprocal(1.0f + e), square = y * y;
  *slope = 4.0f * e * r * r;
  f32v q = square * 1.724154688e-2f - 5.304551870e-2f;
  q = q * square + 1.332587898e-1f;
  q = q * square - 3.333314359e-1f;
  const f32v large = quotient(1.0f - e, 1.0f + e);
  return select(abs(y) < 0.5f, y * square * q + y, select(y < 0.0f, -large, large));
}
GPTFAST_INLINE f32v tanh(f32v y) {
  f32v slope;
  return tanh(y, &slope);
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
