#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

void run_sample(int64_t B, int64_t V, float steps, int64_t top_k, int64_t share, DType dtype) {
  const Buffer logits(B * V, dtype);
  const auto tokens = std::make_unique<int64_t[]>(B), previous = std::make_unique<int64_t[]>(B * 4);
  for (int64_t i = 0; i < B * 4; ++i) previous[i] = i % V - 1;
  gptfast::cuda::sample(logits, V, previous.get(), 4, 4, tokens.get(), B, V, 1.5f, steps, top_k,
                        share, int64_t{1} << 30, 7, 8, dtype, nullptr);
}

}  // namespace

void launch_all(DType dtype) {
  run_sample(2, 37, 0.0f, 37, int64_t{1} << 31, dtype);  // greedy
  run_sample(2, 2500, 3e7f, 2500, int64_t{1} << 31, dtype);
  run_sample(1, 2501, 3e7f, 40, int64_t{1} << 30, dtype);
}
