// Sweeps over memory: reads that are asked for ahead, and stores that pass by the caches, for results
// that the caches could not hold anyway.
#pragma once
#include "parallel.h"  // whose threads end with a fence
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gptfast::GPTFAST_ISA {
namespace {

// Asks for the line so many bytes behind p, where an Intel processor's own prefetcher, which stops at the
// end of a page, would not.
template <int BYTES = 4096, class T>
GPTFAST_INLINE void read_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + BYTES);
}

// From how many bytes on a result is streamed. Measured on two cores with 2 MB of second-level cache
// each: a copy that is read again at once is as fast either way at 24 MB, and from 48 MB on faster
// streamed, by 1.2; one that is not is faster at any size, by 1.3 to 1.6, since a plain store first
// reads the line that it overwrites. Below, the next op finds the result in a cache.
constexpr int64_t kStreamBytes = 20'000'000;

struct PlainStores {
  template <class Part, class T>
  void store(Part part, T* p, f32v v) const {
    part.store(p, v);
  }
};

struct StreamingStores {
  template <class T>
  void store(Tail part, T* p, f32v v) const {
    part.store(p, v);
  }
  void store(Whole, float* p, f32v v) const {
#if GPTFAST_VECTOR_BYTES == 64
    _mm512_stream_ps(p, v);
#elif GPTFAST_VECTOR_BYTES == 32
    _mm256_stream_ps(p, v);
#else
    GPTFAST_ISA::store(p, v);
#endif
  }
  template <class T>
  void store(Whole, T* p, f32v v) const {
#if GPTFAST_VECTOR_BYTES == 64
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(to_bits(v, T{})));
#elif GPTFAST_VECTOR_BYTES == 32
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(to_bits(v, T{})));
#else
    GPTFAST_ISA::store(p, v);
#endif
  }
};

// Whether memory has no pages yet. Large results often have none: glibc maps anew what is larger than
// 32 MiB. Then asks for huge pages: a fault for each 4 KB costs several times the arithmetic.
inline bool is_fresh(const void* result, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result), middle = begin + bytes / 2;
  unsigned char resident = 1;
  if (mincore(reinterpret_cast<void*>(middle / kPage * kPage), kPage, &resident) || resident & 1)
    return false;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return true;
#else
  return false;
#endif
}

// Calls body with the stores that suit a result of so many bytes, which starts at `result`. aligned: a
// `Whole` store's address is always a multiple of what it stores.
template <class Body>
inline void with_stores_if(bool aligned, const void* result, int64_t bytes, const Body& body) {
  // The system has just cleared fresh pages, in the caches: they are no place to stream past.
  if (bytes < kStreamBytes || is_fresh(result, bytes) || W == 4 || !aligned)
    body(PlainStores{});
  else
    body(StreamingStores{});
}

// Whether every `Whole` store is aligned into M rows of N columns, `stride` from each other, of which
// every row is written from its first column, or from a multiple of 64 of all M N elements.
template <class T>
inline bool has_aligned_stores(const T* result, int64_t M, int64_t N, int64_t stride) {
  return reinterpret_cast<uintptr_t>(result) % (W * sizeof(T)) == 0 &&
         (M == 1 || (N % W == 0 && stride % W == 0));
}

// with_stores_if for M such rows that follow each other.
template <class T, class Body>
inline void with_stores(const T* result, int64_t M, int64_t N, const Body& body) {
  with_stores_if(has_aligned_stores(result, M, N, N), result, M * N * sizeof(T), body);
}

// How many elements lie before the first of a whole vector's alignment.
template <class T>
inline int64_t elements_to_alignment(const T* p) {
  return -(reinterpret_cast<uintptr_t>(p) / sizeof(T)) % W;
}

// Copies whole lines of 64 bytes past the caches. Both pointers are multiples of 64.
inline void stream_lines(void* to, const void* from, int64_t bytes) {
#if GPTFAST_VECTOR_BYTES == 64
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                        _mm512_load_si512(static_cast<const char*>(from) + i));
#elif GPTFAST_VECTOR_BYTES == 32
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
        _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
#else
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
