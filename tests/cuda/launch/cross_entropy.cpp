#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

void run_cross_entropy(int64_t M, int64_t V, float smoothing, bool weighted, DType dtype) {
  const Buffer x(M * V, dtype), dx(M * V, dtype), loss = floats(M), lse = floats(M);
  const Buffer w = weighted ? Buffer(V, dtype) : Buffer(), w_sum = floats(1);
  const auto target = std::make_unique<int64_t[]>(M);
  const int64_t none[] = {-100, -1, V, int64_t{1} << 40};  // ignored, or no class
  for (int64_t i = 0; i < M; ++i) target[i] = i % 2 ? none[i / 2 % 4] : (i * 7) % V;
  gptfast::cuda::cross_entropy_fwd(x, target.get(), w, dtype, loss, lse, M, V, -100, smoothing,
                                   1e-4f, 30.0f, dtype, nullptr);
  gptfast::cuda::cross_entropy_bwd(loss, x, target.get(), w, dtype, w_sum, lse, dx, M, V, -100,
                                   smoothing, 1e-4f, 30.0f, dtype, nullptr);
  for (const int64_t shared_bytes : {160 * 1024, 5000, 0}) {  // a row, a part of one, nothing
    gptfast::cuda::cross_entropy_fused(lse, x, target.get(), w, dtype, loss, dx, M, V, -100,
                                       smoothing, 1e-4f, 30.0f, shared_bytes, dtype, nullptr);
    gptfast::cuda::cross_entropy_fused(lse, dx, target.get(), w, dtype, loss, dx, M, V, -100,
                                       smoothing, 1e-4f, 30.0f, shared_bytes, dtype, nullptr);
  }
}

}  // namespace

void launch_all(DType dtype) {
  run_cross_entropy(8, 37, 0.0f, false, dtype);
  run_cross_entropy(8, 37, 0.1f, true, dtype);
  run_cross_entropy(2, 4097, 0.1f, true, dtype);
}
