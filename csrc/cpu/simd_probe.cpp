// The vector functions themselves, elementwise over fp32 arrays, so that tests can measure them.
#include "isa.h"
#include "simd.h"

DECLARE_KERNEL(simd_exp, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_exp_to_87, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_exp2, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_erfc, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_tanh, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_tanh_slope, void(const float* x, float* y, int64_t n))
DECLARE_KERNEL(simd_convert, void(const void* x, DType from, void* y, DType to, int64_t n))

namespace gptfast::GPTFAST_ISA {
namespace {

void simd_exp(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) { part.store(y + i, exp(part.load(x + i))); });
}
void simd_exp_to_87(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) { part.store(y + i, exp_to_87(part.load(x + i))); });
}
void simd_exp2(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) { part.store(y + i, exp2(part.load(x + i))); });
}
void simd_erfc(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) {
    const f32v z = part.load(x + i);
    part.store(y + i, erfc_nonnegative(z, exp_to_87(-z * z)));
  });
}
void simd_tanh(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) { part.store(y + i, tanh(part.load(x + i))); });
}
void simd_tanh_slope(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto part) {
    f32v slope;
    tanh(part.load(x + i), &slope);
    part.store(y + i, slope);
  });
}
void simd_convert(const void* x, DType from, void* y, DType to, int64_t n) {
  with_dtype(from, [&](auto f) {
    with_dtype(to, [&](auto t) {
      const auto* in = static_cast<const decltype(f)*>(x);
      auto* out = static_cast<decltype(t)*>(y);
      for_each_vector(n, [&](int64_t i, auto part) { part.store(out + i, part.load(in + i)); });
    });
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(simd_exp)
REGISTER_KERNEL(simd_exp_to_87)
REGISTER_KERNEL(simd_exp2)
REGISTER_KERNEL(simd_erfc)
REGISTER_KERNEL(simd_tanh)
REGISTER_KERNEL(simd_tanh_slope)
REGISTER_KERNEL(simd_convert)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_simd_probe(pybind11::module_& m) {
  gptfast::bind_kernel(m, "simd_exp", gptfast::kernel_simd_exp);
  gptfast::bind_kernel(m, "simd_exp_to_87", gptfast::kernel_simd_exp_to_87);
  gptfast::bind_kernel(m, "simd_exp2", gptfast::kernel_simd_exp2);
  gptfast::bind_kernel(m, "simd_erfc", gptfast::kernel_simd_erfc);
  gptfast::bind_kernel(m, "simd_tanh", gptfast::kernel_simd_tanh);
  gptfast::bind_kernel(m, "simd_tanh_slope", gptfast::kernel_simd_tanh_slope);
  gptfast::bind_kernel(m, "simd_convert", gptfast::kernel_simd_convert);
}
#endif
