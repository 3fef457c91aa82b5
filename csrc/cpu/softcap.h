// What becomes of a logit before everything else: nothing, or k tanh(x / k).
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

struct Plain {
  GPTFAST_INLINE f32v operator()(f32v x) const { return x; }
  GPTFAST_INLINE f32v slope(f32v) const { return set1(1.0f); }
};
struct Softcap {
  float k;
  GPTFAST_INLINE f32v operator()(f32v x) const { return k * tanh(x * (1 / k)); }
  GPTFAST_INLINE f32v slope(f32v x) const {
    f32v slope;
    tanh(x * (1 / k), &slope);
    return slope;
  }
};

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
