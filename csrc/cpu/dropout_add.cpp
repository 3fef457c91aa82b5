// out = residual + z x, where z are the factors of dropout; without a residual, out = z x: the
// gradient of x. Every tensor is read or written once.
#include "residual.h"

// x, residual and out are (M, N); residual, which has out's dtype, may be null.
DECLARE_KERNEL(dropout_add,
               void(const void* x, const void* residual, void* out, int64_t M, int64_t N,
                    int64_t threshold, int64_t seed, DType x_dtype, DType out_dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread: about 5 us of work, the price of a fork

template <class T, class R>
void rows(const T* x, const R* residual, R* out, int64_t M, int64_t N, const RowDropout& dropout) {
  parallel_for(M, kGrain / (N + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* z = dropout.row(i, N);
      const R* stream = residual ? residual + i * N : nullptr;
      for_each_vector(N, [&](int64_t j, auto part) {
        f32v v = part.load(x + i * N + j);
        if (z) v *= part.load(z + j);
        if (stream) v += part.load(stream + j);
        part.store(out + i * N + j, v);
      });
    }
  });
}

void dropout_add(const void* x, const void* residual, void* out, int64_t M, int64_t N,
                 int64_t threshold, int64_t seed, DType x_dtype, DType out_dtype) {
  const RowDropout dropout(threshold, seed);
  const auto run = [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    rows(static_cast<const T*>(x), static_cast<const R*>(residual), static_cast<R*>(out), M, N,
         dropout);
  };
  // The gradient of a half-precision branch comes from an fp32 stream.
  if (x_dtype == DType::F32)
    with_dtype(out_dtype, [&](auto r) { run(float{}, r); });
  else
    with_stream_dtype(x_dtype, out_dtype, run);
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(dropout_add)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_dropout_add(pybind11::module_& m) {
  gptfast::bind_kernel(m, "dropout_add", gptfast::kernel_dropout_add);
}
#endif
