// What becomes of a logit before everything else: nothing, or k tanh(x / k).
#pragma once
#include <cfloat>

#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

struct Plain {
  GPTFAST_INLINE f32v operator()(f32v x) const { return x; }
  GPTFAST_INLINE f32v slope(f32v) const { return set1(1.0f); }
};
struct Softcap {
  explicit Softcap(float k) : k(k), inverse(1 / k < FLT_MAX ? 1 / k : FLT_MAX) {}
  float k, inverse;
  GPTFAST_INLINE f32v operator()(f32v x) const { return k * tanh(x * inverse); }
  GPTFAST_INLINE f32v slope(f32v x) const {
    f32v slope;
    tanh(x * inverse, &slope);
    return slope;
  }
};

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
