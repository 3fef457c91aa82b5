// Activations and their slopes, one element at a time. The maths stands in gptfast/ops/gelu.py and
// gptfast/ops/glu.py.
#pragma once
#include "common.cuh"

namespace gptfast::cuda {

// a / b to 2 ulp, and 0 where |b| is above 2^126. The exact division is a call, round which registers
// spill.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

struct TanhGelu {
  static constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
  static constexpr float kCubic = 0.044715f;

  static __device__ __forceinline__ float value(float x) {
    return quotient(x, 1.0f + expf(-kTwoSqrt2OverPi * (x + kCubic * x * x * x)));
  }
  static __device__ __forceinline__ float slope(float x) {
    // Beyond |x| = 10 the slope is 0 or 1: leaving x out there keeps x^2 from overflowing.
    const float c = fabsf(x) > 10.0f ? copysignf(10.0f, x) : x;
    // s and 1 - s = e s from one exponential: 1 - s by subtraction would lose digits that the large
    // factors bring back.
    const float e = expf(-kTwoSqrt2OverPi * (c + kCubic * c * c * c));
    const float s = quotient(1.0f, 1.0f + e);
    return s + c * s * (e * s) * (kTwoSqrt2OverPi * (1.0f + 3 * kCubic * c * c));
  }
};

struct ErfGelu {
  static constexpr float kSqrtHalf = 0.7071067811865476f;
  static constexpr float kInvSqrt2Pi = 0.3989422804014327f;

  static __device__ __forceinline__ float phi(float x) { return 0.5f * erfcf(-x * kSqrtHalf); }
  static __device__ __forceinline__ float value(float x) { return x * phi(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float c = fabsf(x) > 15.0f ? copysignf(15.0f, x) : x;
    return phi(x) + c * (kInvSqrt2Pi * expf(-0.5f * c * c));
  }
};

struct Silu {
  static __device__ __forceinline__ float value(float x) { return quotient(x, 1.0f + expf(-x)); }
  static __device__ __forceinline__ float slope(float x) {
    // Beyond |x| = 200 the slope is 0 or 1: leaving x out there keeps infinity from the product.
    const float c = fabsf(x) > 200.0f ? copysignf(200.0f, x) : x;
    const float q = expf(-fabsf(c));  // at most 1: neither s nor 1 - s overflows or loses digits
    const float large = quotient(1.0f, 1.0f + q), small = q * large;
    return c > 0.0f ? large + c * large * small : small + c * small * large;
  }
};

// Calls body with the form that `tanh_form` names.
template <class Body>
void with_gelu(bool tanh_form, const Body& body) {
  tanh_form ? body(TanhGelu{}) : body(ErfGelu{});
}

// Calls body with an activation by its code: the position in ACTIVATIONS of gptfast/ops/glu.py.
template <class Body>
void with_activation(int code, const Body& body) {
  switch (code) {
    case 0: return body(Silu{});
    case 1: return body(ErfGelu{});
    case 2: return body(TanhGelu{});
  }
  throw std::runtime_error("CUDA: no activation has the code " + std::to_string(code));
}

}  // namespace gptfast::cuda
