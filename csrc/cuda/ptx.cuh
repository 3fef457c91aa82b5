// The PTX instructions that kernels use, one small function each, with its twin for the host runner.
#pragma once
#include <type_traits>

#include "platform.cuh"

namespace gptfast::cuda {

// ---- st.global: 16 bytes that the kernel does not read again ---------------------------------------

// The compiler takes a plain store apart where another branch stores the same elements one by one.
__device__ __forceinline__ void store_global_16(void* to, uint4 x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
#else
  *static_cast<uint4*>(to) = x;
#endif
}

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

// ---- Matrix instructions: a warp together -----------------------------------------------------------
//
// With g = lane / 4 and t = lane % 4, a lane holds of an 8 x 8 matrix of 16-bit elements the two in
// row g, columns 2 t and 2 t + 1, in one register.

#ifdef __CUDACC__
#define CALLED_FROM
#else
#define CALLED_FROM , SourceLine called_from = SourceLine::current()
#endif

// Four such matrices from shared memory. Lane l hands in where row l % 8 of matrix l / 8 begins,
// aligned to 16 bytes. kTransposed: each matrix is transposed on its way.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_4(uint32_t (&matrices)[4], const void* row CALLED_FROM) {
#ifdef __CUDACC__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
#else
  if (reinterpret_cast<uintptr_t>(row) & 15)
    cuda_on_cpu::fail("ldmatrix_4: an address is not aligned to 16 bytes");
  const int g = cuda_on_cpu::current->lane() / 4, t = cuda_on_cpu::current->lane() % 4;
  struct Row {
    uint16_t at[8];
  };
  Row own;  // read by the lane that hands in its address
  std::memcpy(&own, row, sizeof own);
  cuda_on_cpu::warp_exchange({"ldmatrix", called_from}, 0xffffffffu, own, [&](auto row_of) {
    for (int i = 0; i < 4; ++i)
      matrices[i] =
          kTransposed
              ? row_of(8 * i + 2 * t).at[g] | uint32_t{row_of(8 * i + 2 * t + 1).at[g]} << 16
              : row_of(8 * i + g).at[2 * t] | uint32_t{row_of(8 * i + g).at[2 * t + 1]} << 16;
  });
#endif
}

// c += a b, of which a is 16 x 16, b is 16 x 8 and c is 16 x 8. The 8 x 8 parts of a: above left,
// below left, above right, below right. Those of b, each transposed: above, below. A lane holds of
// c the columns 2 t and 2 t + 1 of row g, then those of row g + 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b_above,
                                            uint32_t b_below CALLED_FROM) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_above), "r"(b_below));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_above), "r"(b_below));
#else
  struct Held {
    uint32_t a[4], b[2];
  };
  const Held own{{a[0], a[1], a[2], a[3]}, {b_above, b_below}};
  const auto element = [](uint32_t pair, int i) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * i);
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
    return static_cast<float>(value);
  };
  const int g = cuda_on_cpu::current->lane() / 4, t = cuda_on_cpu::current->lane() % 4;
  cuda_on_cpu::warp_exchange({"mma", called_from}, 0xffffffffu, own, [&](auto held_by) {
    for (int i = 0; i < 4; ++i) {  // the lanes with elements 2 i, 2 i + 1, 2 i + 8 and 2 i + 9
      const Held rows = held_by(4 * g + i);
      for (int column = 0; column < 2; ++column) {
        const Held columns = held_by(4 * (2 * t + column) + i);
        for (int k = 0; k < 4; ++k) {
          const float factor = element(columns.b[k / 2], k % 2);
          c[column] += element(rows.a[k / 2 * 2], k % 2) * factor;
          c[column + 2] += element(rows.a[k / 2 * 2 + 1], k % 2) * factor;
        }
      }
    }
  });
#endif
}

// ---- Arithmetic --------------------------------------------------------------------------------------

// 2^x, two ulp off at most; 0 where that is below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

}  // namespace gptfast::cuda
