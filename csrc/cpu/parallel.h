// Threads: OpenMP, the runtime that PyTorch has already started, so torch.set_num_threads counts.
#pragma once
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

namespace gptfast::GPTFAST_ISA {
namespace {

// An exception must not leave a parallel region: the first one waits here until the region is over.
class Failure {
 public:
  template <class Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (...) {
#pragma omp critical(gptfast_failure)
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// Makes what a thread has streamed past the caches (stream.h) visible before others are told.
inline void finish_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Splits [0, n) into one contiguous piece per thread and calls body(begin, end) on each. A piece
// has at least `grain` items: what is smaller than that stays on the calling thread.
template <class Body>
inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
  const int64_t allowed = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int threads = static_cast<int>(pieces < allowed ? pieces : allowed);
  if (threads <= 1) {
    body(int64_t{0}, n);
    finish_stores();
    return;
  }
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
    failure.guard([&] { body(n * t / team, n * (t + 1) / team); });
    finish_stores();
  }
  failure.rethrow();
}

// Hands out [0, n) one item at a time, for items of unequal cost. `flops` is the work of all of
// them: what takes a few microseconds stays on the calling thread.
template <class Body>
inline void parallel_for_dynamic(int64_t n, int64_t flops, const Body& body) {
  constexpr int64_t kForkFlops = 500'000;
  if (n <= 1 || flops < kForkFlops || omp_in_parallel() || omp_get_max_threads() == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Failure failure;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) failure.guard([&] { body(i); });
  failure.rethrow();
}

// A 64-byte aligned scratch buffer that the thread keeps between calls.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T = float>
  T* reserve(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      capacity_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
