#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

void run_gelu(int64_t n, bool tanh_form, DType dtype) {
  const Buffer x(n, dtype), dy(n, dtype), out(n, dtype);
  gptfast::cuda::gelu_fwd(x, out, n, tanh_form, dtype, nullptr);
  gptfast::cuda::gelu_bwd(dy, x, out, n, tanh_form, dtype, nullptr);
}

void run_bias_gelu(int64_t M, int64_t N, bool tanh_form, DType dtype) {
  const int64_t programs = M < 3 ? M : 3;
  const Buffer x(M * N, dtype), dy(M * N, dtype), out(M * N, dtype), bias = floats(N);
  const Buffer db = floats(N), partial = floats(programs * N);
  gptfast::cuda::bias_gelu_fwd(x, bias, DType::F32, out, M, N, tanh_form, dtype, nullptr);
  gptfast::cuda::bias_gelu_bwd(dy, x, bias, DType::F32, out, db, partial, programs, M, N, tanh_form,
                               dtype, nullptr);
}

}  // namespace

void launch_all(DType dtype) {
  for (const bool tanh_form : {true, false}) {
    for (const int64_t n : {1, 37, 2051}) run_gelu(n, tanh_form, dtype);
    for (const int64_t N : {7, 300}) run_bias_gelu(70, N, tanh_form, dtype);
  }
}
