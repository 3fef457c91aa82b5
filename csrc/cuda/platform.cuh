// What every .cu file includes first: CUDA as nvcc knows it, or as the host runner plays it.
//
// Kernels are plain CUDA, with two conventions that let g++ compile them too: dynamic shared memory
// is declared by DYN_SMEM(name), an array of bytes aligned to 128, and a kernel is launched by
// LAUNCH((kernel<...>), grid, block, shared bytes, stream, arguments ...), which throws where the
// launch fails. PTX stands in ptx.cuh and nowhere else.
#pragma once
#ifndef __CUDACC__
#include "host/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  gptfast::cuda::launch(#kernel, kernel, grid, block, smem, stream, __VA_ARGS__)

namespace gptfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Args... args) {
  // 48 KiB, of which kernels declare up to 8 themselves.
  constexpr size_t kWithoutAsking = 40 * 1024;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), name);
}

}  // namespace gptfast::cuda
#endif
