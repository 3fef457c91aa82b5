// What becomes of a logit before everything else: nothing, or k tanh(x / k).
#pragma once
#include "simd.h"

namespace gptfast::GPTFAST_ISA {
namespace {

struct Plain {
  f32v operator()(f32v x) const { return x; }
  f32v slope(f32v) const { return set1(1.0f); }
};
struct Softcap {
  float k;
  f32v operator()(f32v x) const { return k * tanh(x / k); }
  f32v slope(f32v x) const { return tanh_slope(x / k); }
};

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
