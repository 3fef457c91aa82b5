// What this machine can do at best, for benchmarks to compare with: bytes moved, fp32
// multiply-adds, and bf16 tile products, each in a loop that does nothing else.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include <stdexcept>

// Sweeps arrays of `bytes` each (a multiple of 64, at aligned addresses): reads all of `reads`, and
// writes to all of `writes`, which may be some of the same. With `stream` the stores pass by the
// caches, where the instruction set can.
DECLARE_KERNEL(ceiling_sweep, void(const int64_t* reads, int64_t n_reads, const int64_t* writes,
                                   int64_t n_writes, int64_t bytes, bool stream))
// Multiply-adds on registers, `steps` times per thread. Returns the floating-point operations.
DECLARE_KERNEL(ceiling_fma, double(int64_t steps))
// bf16 tile products into four tiles of sums, `steps` times per thread; with `load` their operands
// come from the second-level cache. Returns the floating-point operations: 0 without AMX.
DECLARE_KERNEL(ceiling_tiles, double(int64_t steps, bool load))

namespace gptfast::GPTFAST_ISA {
namespace {

inline f32v* vectors(int64_t address) { return reinterpret_cast<f32v*>(address); }

// Keeps the compiler from foreseeing a vector's value.
inline void keep(f32v& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

inline void stream_store(f32v* p, f32v v) {
#if GPTFAST_VECTOR_BYTES == 64
  _mm512_stream_ps(reinterpret_cast<float*>(p), v);
#elif GPTFAST_VECTOR_BYTES == 32
  _mm256_stream_ps(reinterpret_cast<float*>(p), v);
#else
  *p = v;
#endif
}

template <int READS, int WRITES, bool STREAM>
void sweep(const int64_t* reads, const int64_t* writes, int64_t bytes) {
  constexpr int kLine = 64 / sizeof(f32v);  // vectors in a cache line
  parallel_for(bytes / 64, 1024, [&](int64_t begin, int64_t end) {
    f32v totals[kLine]{};
    for (int64_t line = begin; line < end; ++line) {
      f32v v[kLine]{};
#pragma GCC unroll 4
      for (int k = 0; k < kLine; ++k) {
#pragma GCC unroll 4
        for (int r = 0; r < READS; ++r) v[k] += vectors(reads[r])[line * kLine + k];
        if (WRITES == 0) totals[k] += v[k];
      }
#pragma GCC unroll 4
      for (int w = 0; w < WRITES; ++w)
#pragma GCC unroll 4
        for (int k = 0; k < kLine; ++k) {
          f32v* p = vectors(writes[w]) + line * kLine + k;
          if (STREAM)
            stream_store(p, v[k]);
          else
            *p = v[k];
        }
    }
    for (const f32v& total : totals) asm volatile("" ::"m"(total));
#if defined(__x86_64__)
    if (STREAM) _mm_sfence();
#endif
  });
}

template <int READS, int WRITES>
void sweep_as(const int64_t* reads, const int64_t* writes, int64_t bytes, bool stream) {
  stream ? sweep<READS, WRITES, true>(reads, writes, bytes)
         : sweep<READS, WRITES, false>(reads, writes, bytes);
}

template <int READS>
void sweep_reading(const int64_t* reads, const int64_t* writes, int64_t n_writes, int64_t bytes,
                   bool stream) {
  switch (n_writes) {
    case 0: return sweep_as<READS, 0>(reads, writes, bytes, false);
    case 1: return sweep_as<READS, 1>(reads, writes, bytes, stream);
    case 2: return sweep_as<READS, 2>(reads, writes, bytes, stream);
    case 3: return sweep_as<READS, 3>(reads, writes, bytes, stream);
    default: throw std::invalid_argument("ceiling_sweep: at most 4 reads and 3 writes");
  }
}

void ceiling_sweep(const int64_t* reads, int64_t n_reads, const int64_t* writes, int64_t n_writes,
                   int64_t bytes, bool stream) {
  switch (n_reads) {
    case 0: return sweep_reading<0>(reads, writes, n_writes, bytes, stream);
    case 1: return sweep_reading<1>(reads, writes, n_writes, bytes, stream);
    case 2: return sweep_reading<2>(reads, writes, n_writes, bytes, stream);
    case 3: return sweep_reading<3>(reads, writes, n_writes, bytes, stream);
    case 4: return sweep_reading<4>(reads, writes, n_writes, bytes, stream);
    default: throw std::invalid_argument("ceiling_sweep: at most 4 reads and 3 writes");
  }
}

double ceiling_fma(int64_t steps) {
  constexpr int kSums = 12;  // enough to hide the latency of two multiply-adds per cycle
  const int64_t threads = omp_get_max_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      f32v s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
      const f32v a = set1(1e-6f), b = set1(0.5f);
      const auto multiply_add = [&](auto&... sums) { ((sums = a * sums + b, keep(sums)), ...); };
      for (int64_t step = 0; step < steps; ++step)
        multiply_add(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11);
    }
  });
  return 2.0 * W * kSums * steps * threads;
}

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The sums are tiles 0 to 3: two rows of tiles of A by two columns of tiles of B.
template <bool LOAD>
void multiply_tiles(int64_t steps, const char* a, const char* b, int64_t panel) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    if (LOAD) {
      const int64_t at = step * 2048 % panel;
      _tile_loadd(4, a + at, 64);
      _tile_loadd(5, a + at + 1024, 64);
      _tile_loadd(6, b + at, 64);
      _tile_loadd(7, b + at + 1024, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

double ceiling_tiles(int64_t steps, bool load) {
  constexpr double kFlopsPerStep = 4 * 2.0 * 16 * 16 * 32;
  // Panels of A and B: a second-level cache holds them, a first-level cache does not.
  constexpr int64_t kPanel = 256 * 1024;
  const int64_t threads = omp_get_max_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    const TileConfig config;
    // gcc 12 may drop the stores to `config` otherwise.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
    static thread_local Scratch scratch;
    const char* a = reinterpret_cast<char*>(scratch.reserve(2 * kPanel / 4));
    std::memset(const_cast<char*>(a), 0, 2 * kPanel);
    for (int64_t t = begin; t < end; ++t)
      load ? multiply_tiles<true>(steps, a, a + kPanel, kPanel)
           : multiply_tiles<false>(steps, a, a + kPanel, kPanel);
    _tile_release();
  });
  return kFlopsPerStep * steps * threads;
}
#else
double ceiling_tiles(int64_t, bool) { return 0; }
#endif

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(ceiling_sweep)
REGISTER_KERNEL(ceiling_fma)
REGISTER_KERNEL(ceiling_tiles)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_ceiling_probe(pybind11::module_& m) {
  gptfast::bind_kernel(m, "ceiling_sweep", gptfast::kernel_ceiling_sweep);
  gptfast::bind_kernel(m, "ceiling_fma", gptfast::kernel_ceiling_fma);
  gptfast::bind_kernel(m, "ceiling_tiles", gptfast::kernel_ceiling_tiles);
}
#endif
