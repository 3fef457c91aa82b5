// GELU's Phi in its two forms, and SiLU, with their slopes; gelu.cpp has the maths.
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

// A form has the activation, `value`, alone and with its derivative. Where x is so small that both
// are below 2^-116, they are taken for 0.

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
  GPTFAST_INLINE static f32v value(f32v x, f32v* slope) {
    // Beyond |x| = 10 the slope is 0 or 1 to the last bit; clamping keeps x^2 from overflowing.
    const f32v c = min(set1(10.0f), max(set1(-10.0f), x));
    // s and 1 - s from one exponential: 1 - s by subtraction would lose digits that u' brings back.
    const f32v e = exponential(c), s = select(x < -10.0f, f32v{}, reciprocal(1.0f + e));
    const f32v two_du = c * c * (3 * kTwoU * kCubic) + kTwoU;
    *slope = s + (c * s) * (e * s) * two_du;
    return x * s;
  }
};

struct ErfForm {
  GPTFAST_INLINE static f32v value(f32v x, f32v* slope) {
    const f32v c = min(set1(13.1f), max(set1(-13.1f), x));  // keeps the exponent above -87
    const f32v e = select(x < -13.1f, f32v{}, exp_to_87(-0.5f * c * c));
    const f32v tail = 0.5f * erfc_nonnegative(abs(c) * kSqrtHalf, e);
    const f32v cdf = select(c > 0.0f, 1.0f - tail, tail);
    *slope = cdf + c * (kInvSqrt2Pi * e);
    return x * cdf;
  }
  GPTFAST_INLINE static f32v value(f32v x) {
    f32v slope;
    return value(x, &slope);
  }
};

struct SiluForm {
  GPTFAST_INLINE static f32v value(f32v x) {
    const f32v c = min(set1(87.0f), max(set1(-87.0f), x));
    return x * select(x < -87.0f, f32v{}, reciprocal(1.0f + exp_to_87(-c)));
  }
  GPTFAST_INLINE static f32v value(f32v x, f32v* slope) {
    const f32v c = min(set1(87.0f), max(set1(-87.0f), x));
    // at most 1: neither s nor 1 - s loses digits
    const f32v q = select(x < -87.0f, f32v{}, exp_to_87(-abs(c)));
    const f32v large = reciprocal(1.0f + q), small = q * large;
    const f32v s = select(c > 0.0f, large, small);
    *slope = s + c * large * small;
    return x * s;
  }
};

template <class Form>
GPTFAST_INLINE f32v slope_of(f32v x) {
  f32v slope;
  Form::value(x, &slope);
  return slope;
}

template <class Body>
inline void with_gelu_form(bool tanh_form, const Body& body) {
  tanh_form ? body(TanhForm{}) : body(ErfForm{});
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
