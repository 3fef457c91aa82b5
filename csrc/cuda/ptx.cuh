// The PTX instructions that kernels use, one small function each, with its twin for the host runner.
#pragma once
#include "platform.cuh"

namespace gptfast::cuda {

// ---- cp.async: 16 bytes from global to shared memory, without waiting -----------------------------

// Copies 16 bytes, or writes 16 zeros where `valid` is false; both addresses are aligned to 16.
// Nothing is there before `cp_async_wait`, and other threads see it after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & 15)
    cuda_on_cpu::fail("cp_async_16: an address is not aligned to 16 bytes");
  {
    cuda_on_cpu::Unwatched unwatched;
    cuda_on_cpu::current->open.push_back({shared, global, valid ? 16 : 0});
  }
  std::memset(shared, 0xff, 16);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cuda_on_cpu::Unwatched unwatched;
  auto* thread = cuda_on_cpu::current;
  thread->committed.push_back(std::move(thread->open));
  thread->open.clear();
#endif
}

// Waits until at most `kGroups` of this thread's groups, the latest, are unfinished.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
#else
  auto& groups = cuda_on_cpu::current->committed;
  while (groups.size() > kGroups) {
    std::vector<cuda_on_cpu::Copy> copies;
    {
      cuda_on_cpu::Unwatched unwatched;
      copies = std::move(groups.front());
      groups.erase(groups.begin());
    }
    for (const cuda_on_cpu::Copy& copy : copies) {
      std::memcpy(copy.target, copy.source, copy.bytes);
      std::memset(static_cast<char*>(copy.target) + copy.bytes, 0, 16 - copy.bytes);
    }
  }
#endif
}

}  // namespace gptfast::cuda
