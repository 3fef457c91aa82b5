// Dtype codes shared by Python (gptfast/backend.py), the CPU kernels and the CUDA kernels.
#pragma once
#include <cstdint>

namespace gptfast {

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2 };

// Storage types: 16 raw bits each. Arithmetic is always done in fp32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace gptfast
