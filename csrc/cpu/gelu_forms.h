// GELU's Phi in its two forms, and SiLU, with their slopes; gelu.cpp has the maths.
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

GPTFAST_INLINE f32v sigmoid(f32v z) { return 1.0f / (1.0f + exp(-z)); }

// Phi for the erf form: erfc of a non-negative argument, reflected for x > 0.
GPTFAST_INLINE f32v normal_cdf(f32v x) {
  const f32v tail = 0.5f * erfc_nonnegative(abs(x) * kSqrtHalf);
  return select(x > 0.0f, 1.0f - tail, tail);
}

struct TanhForm {
  static constexpr float kTwoU = 2 * kSqrt2OverPi;
  // exp(-2 u) for x >= -10, where it is 2^126.
  GPTFAST_INLINE static f32v exponential(f32v x) {
    return exp2(x * (x * x * (-kTwoU * kCubic * kLog2E) - kTwoU * kLog2E));
  }
  GPTFAST_INLINE static f32v value(f32v x) {
    const f32v phi = reciprocal(1.0f + exponential(max(set1(-10.0f), x)));
    return x * select(x < -10.0f, f32v{}, phi);  // from 2^-126 on it is nothing
  }
  GPTFAST_INLINE static f32v slope(f32v x) {
    // Beyond |x| = 10 the slope is 0 or 1 to the last bit; clamping keeps x^2 from overflowing.
    const f32v c = min(set1(10.0f), max(set1(-10.0f), x));
    // s and 1 - s from one exponential: 1 - s by subtraction would lose digits that u' brings back.
    const f32v e = exponential(c), s = reciprocal(1.0f + e);
    const f32v two_du = c * c * (3 * kTwoU * kCubic) + kTwoU;
    return s + (c * s) * (e * s) * two_du;
  }
};

struct ErfForm {
  GPTFAST_INLINE static f32v value(f32v x) { return x * normal_cdf(x); }
  GPTFAST_INLINE static f32v slope(f32v x) {
    const f32v c = min(set1(15.0f), max(set1(-15.0f), x));
    return normal_cdf(c) + c * (kInvSqrt2Pi * exp(-0.5f * c * c));
  }
};

struct SiluForm {
  GPTFAST_INLINE static f32v value(f32v x) { return x * sigmoid(x); }
  GPTFAST_INLINE static f32v slope(f32v x) {
    // Beyond |x| = 200 the slope is 0 or 1; clamping keeps infinity out of the product.
    const f32v c = min(set1(200.0f), max(set1(-200.0f), x));
    const f32v q = exp(-abs(c));  // at most 1: neither s nor 1 - s overflows or loses digits
    const f32v large = 1.0f / (1.0f + q), small = q * large;
    return select(c > 0.0f, large + c * large * small, small + c * small * large);
  }
};

template <class Body>
inline void with_gelu_form(bool tanh_form, const Body& body) {
  tanh_form ? body(TanhForm{}) : body(ErfForm{});
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
