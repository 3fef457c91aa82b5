// A small kernel in which each -DPLANT_... makes one mistake, for test_cuda_sanitize.py to see found.
//
// y_i = x_i + x_(n-1-i) for each block of 64 elements: x comes into shared memory by cp.async, the
// sums go through static shared memory and a warp's votes.
#include "../../csrc/cuda/ptx.cuh"

#include <cstdio>
#include <memory>

__global__ void mirrored_sum(const float* x, float* y) {
  DYN_SMEM(memory);
  __shared__ float sums[64];
  auto* xs = reinterpret_cast<float*>(memory);
  const int thread = threadIdx.x;
  x += blockIdx.x * 64;
  y += blockIdx.x * 64;
  if (thread < 16) gptfast::cuda::cp_async_16(xs + 4 * thread, x + 4 * thread, true);
  gptfast::cuda::cp_async_commit();
#ifdef PLANT_MISSING_WAIT
  gptfast::cuda::cp_async_wait<1>();
#else
  gptfast::cuda::cp_async_wait<0>();
#endif
#ifndef PLANT_MISSING_BARRIER
  __syncthreads();
#endif
#ifdef PLANT_SHARED_OVERRUN
  sums[thread] = xs[thread] + xs[64 - thread];
#else
  sums[thread] = xs[thread] + xs[63 - thread];
#endif
#ifdef PLANT_STATIC_OVERRUN
  sums[thread + 1] = sums[thread];
#endif
#ifdef PLANT_DIVERGENT_BARRIER
  if (thread < 32)
    __syncthreads();
  else
    __syncthreads();
#endif
#ifdef PLANT_LEFT_BEFORE_BARRIER
  if (thread == 5) return;
#endif
#ifdef PLANT_LANE_MISSING
  if (thread == 5) return;
  __shfl_xor_sync(0xffffffffu, thread, 1);
#endif
#ifdef PLANT_SHUFFLE_AS_BARRIER  // a shuffle orders no memory
  sums[thread ^ 1] = 1.0f;
  __shfl_xor_sync(0xffffffffu, thread, 1);
  y[thread] = sums[thread];
#endif
  __syncthreads();
#ifdef PLANT_GLOBAL_OVERRUN
  y[thread + 1] = sums[63 - thread];
#else
  y[thread] = sums[63 - thread];
#endif
}

int main(int, char** arguments) {
  constexpr int n = 128;
  const auto x = std::make_unique<float[]>(n + 4), y = std::make_unique<float[]>(n);
  const size_t offset = (16 - reinterpret_cast<uintptr_t>(x.get()) % 16) % 16 / sizeof(float);
  float* aligned = x.get() + offset;
  for (int i = 0; i < n; ++i) aligned[i] = static_cast<float>(i * i);
  try {
    cuda_on_cpu::seed = 1;
    LAUNCH(mirrored_sum, n / 64, 64, 64 * sizeof(float), nullptr, aligned, y.get());
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what());
    return 1;
  }
  for (int i = 0; i < n; ++i) {
    const int mirror = i / 64 * 64 + 63 - i % 64;
    if (y[i] != aligned[i] + aligned[mirror]) {
      std::fprintf(stderr, "wrong value at %d: %g\n", i, y[i]);
      return 1;
    }
  }
  std::puts("right");
}
