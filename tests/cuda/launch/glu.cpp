#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

void run_glu(int64_t M, int64_t N, int activation, DType dtype) {
  const Buffer dy(M * N, dtype), y(M * N, dtype);
  const Buffer both(2 * M * N, dtype), grad(2 * M * N, dtype);
  const auto up = [&](const Buffer& of) { return of.bytes.get() + N * bytes_of(dtype); };
  gptfast::cuda::glu_fwd(both, up(both), y, 2 * N, 2 * N, M, N, activation, dtype, nullptr);
  gptfast::cuda::glu_bwd(dy, both, up(both), grad, up(grad), 2 * N, 2 * N, 2 * N, M, N, activation,
                         dtype, nullptr);
}

}  // namespace

void launch_all(DType dtype) {
  for (const int activation : {0, 1})
    for (const int64_t N : {7, 4104}) run_glu(3, N, activation, dtype);
}
