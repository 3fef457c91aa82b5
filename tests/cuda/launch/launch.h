// What the programs of this folder share. Each is one file, which launches the kernels of the source
// of its name on every path, in heap memory of exactly the right sizes; test_cuda_sanitize.py builds it
// with sanitizers. The values are judged by test_cuda_host.py.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../../../csrc/cuda/common.cuh"
#include "../../../csrc/cuda/launchers.h"

using gptfast::DType;
inline std::mt19937 generator(1);

// `n` random elements of a dtype, or null for none.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  Buffer() = default;
  Buffer(int64_t n, DType dtype) {
    gptfast::cuda::with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      bytes = std::make_unique<char[]>(n * sizeof(T));
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<T*>(bytes.get())[i] = gptfast::cuda::from_float<T>(normal(generator));
    });
  }
  operator void*() const { return bytes.get(); }
  operator float*() const { return reinterpret_cast<float*>(bytes.get()); }
};

inline int64_t bytes_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }
inline Buffer floats(int64_t n) { return Buffer(n, DType::F32); }

// A (B, H, T, D) tensor that lies in memory as (B, T, H, D).
inline gptfast::cuda::Heads heads(const Buffer& x, int64_t H, int64_t T, int64_t D) {
  return {x, T * H * D, D, H * D};
}

// What came before its copy was there would be NaN.
inline void require_finite(const char* what, const Buffer& x, int64_t n, DType dtype) {
  gptfast::cuda::with_dtype(dtype, [&](auto t) {
    const auto* values = reinterpret_cast<const decltype(t)*>(x.bytes.get());
    for (int64_t i = 0; i < n; ++i)
      if (!std::isfinite(gptfast::cuda::to_float(values[i]))) {
        std::fprintf(stderr, "%s: not finite at %ld\n", what, static_cast<long>(i));
        std::exit(1);
      }
  });
}

constexpr int64_t B = 2, H = 4, H_kv = 2;

void launch_all(DType dtype);  // which each program defines
extern const DType kDTypes[2];

int main() {
  cuda_on_cpu::seed = 1;  // sanitizers judge what is ordered, not the order that was run
  for (const DType dtype : kDTypes) launch_all(dtype);
  std::puts("launched all");
}
