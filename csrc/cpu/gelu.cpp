// GELU, y = x Phi(x), and its gradient, elementwise.
//
//   tanh:  Phi(x) ~ s(x) = sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3)
//          dy/dx = s + x s (1 - s) 2 u',  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
//   erf:   Phi(x) = erfc(-x / sqrt 2) / 2
//          dy/dx = Phi(x) + x phi(x),     phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
//
// Forward reads x and writes y once; backward reads dy and x and writes dx once.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

DECLARE_KERNEL(gelu_fwd, void(const void* x, void* y, int64_t n, bool tanh_form, DType dtype))
DECLARE_KERNEL(gelu_bwd, void(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form,
                              DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread: about 5 us of work, the price of a fork
constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

inline f32v sigmoid(f32v z) { return 1.0f / (1.0f + exp(-z)); }

// Phi for the erf form: erfc of a non-negative argument, reflected for x > 0.
inline f32v normal_cdf(f32v x) {
  const f32v tail = 0.5f * erfc_nonnegative(abs(x) * kSqrtHalf);
  return select(x > 0.0f, 1.0f - tail, tail);
}

struct TanhForm {
  static f32v value(f32v x) {
    const f32v two_u = 2 * kSqrt2OverPi * (x + kCubic * x * x * x);
    return x * sigmoid(two_u);
  }
  static f32v slope(f32v x) {
    // Beyond |x| = 10 the slope is 0 or 1 to the last bit; clamping keeps x^2 from overflowing.
    const f32v c = min(set1(10.0f), max(set1(-10.0f), x));
    // s and 1 - s from one exponential: 1 - s by subtraction would lose digits that u' brings back.
    const f32v e = exp(-2 * kSqrt2OverPi * (c + kCubic * c * c * c));
    const f32v s = 1.0f / (1.0f + e);
    const f32v two_du = 2 * kSqrt2OverPi * (1.0f + 3 * kCubic * c * c);
    return s + c * s * (e * s) * two_du;
  }
};

struct ErfForm {
  static f32v value(f32v x) { return x * normal_cdf(x); }
  static f32v slope(f32v x) {
    const f32v c = min(set1(15.0f), max(set1(-15.0f), x));
    return normal_cdf(c) + c * (kInvSqrt2Pi * exp(-0.5f * c * c));
  }
};

template <class Form, class T>
void forward(const T* x, T* y, int64_t n) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, auto part) {
      part.store(y + begin + i, Form::value(part.load(x + begin + i)));
    });
  });
}

template <class Form, class T>
void backward(const T* dy, const T* x, T* dx, int64_t n) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, auto part) {
      const f32v slope = Form::slope(part.load(x + begin + i));
      part.store(dx + begin + i, part.load(dy + begin + i) * slope);
    });
  });
}

void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    (tanh_form ? forward<TanhForm, T> : forward<ErfForm, T>)(static_cast<const T*>(x),
                                                             static_cast<T*>(y), n);
  });
}

void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    (tanh_form ? backward<TanhForm, T> : backward<ErfForm, T>)(static_cast<const T*>(dy),
                                                               static_cast<const T*>(x),
                                                               static_cast<T*>(dx), n);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(gelu_fwd)
REGISTER_KERNEL(gelu_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_gelu(pybind11::module_& m) {
  gptfast::bind_kernel(m, "gelu_fwd", gptfast::kernel_gelu_fwd);
  gptfast::bind_kernel(m, "gelu_bwd", gptfast::kernel_gelu_bwd);
}
#endif
