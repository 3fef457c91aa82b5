// Runs CUDA kernels on a CPU: included instead of the CUDA runtime where g++ compiles a .cu file.
//
// A launch runs its blocks one after another, in an order shuffled by a seed. Each thread of a block
// is a fiber with its own stack, and a fiber runs until it must wait: at a barrier, for the other
// lanes of its warp, or at its end. So every interleaving is one that a GPU may show, the same seed
// gives the same run, and what a kernel does wrong is found instead of sometimes happening:
//
//   threads of a block wait at different barriers, or one ends while others wait   an exception
//   lanes of a warp wait at different warp instructions, or one does not come      an exception
//   a missing barrier or __syncwarp           a data race, under ThreadSanitizer, and wrong values
//   a missing wait for cp.async               0xFF bytes, which are NaN (see ptx.cuh)
//   dynamic shared memory read before it is written                                0xFF bytes, too
//   an overrun of shared, global or local memory      under AddressSanitizer; dynamic shared memory
//                                                     is heap memory of exactly the launched size
//
// Warp shuffles and votes order no memory accesses, as on a GPU: ThreadSanitizer sees a race where
// lanes exchange data through memory with nothing but a shuffle in between.
//
// It does not show what needs a GPU: blocks that run at the same time, memory order between them,
// the hardware's layout of matrix fragments, speed. Launches come from one OS thread at a time (a
// lock sees to it). Only x86-64 with the System V ABI, whose registers `fiber_switch` knows.
//
// One header of more than 500 lines, because it stands in for one, the runtime's.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the host runner switches fibers in x86-64 assembly, for Linux"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

// The vendor's headers leave these empty for a host compiler, or say something else.
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __shared__ static  // a static object has red zones under AddressSanitizer
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

// ---- Sanitizers ---------------------------------------------------------------------------------

// Hides the runner's own memory accesses from ThreadSanitizer: only the kernel's are judged.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
#endif
};

// What a thread did before its `release` happened before what another does after its `acquire`.
inline void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}
inline void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

// ---- Fibers -------------------------------------------------------------------------------------

// Saves the registers that a function must preserve, and the control words of both floating-point
// units, on this stack; goes on where the other stack was left.
extern "C" void fiber_switch(void** save, void* load);
asm(R"(
.pushsection .text
.weak fiber_switch
.type fiber_switch,@function
fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fiber_switch,.-fiber_switch
.popsection
)");

// Where a fiber, or the launching thread, stands while it does not run.
struct Context {
  void* stack_pointer = nullptr;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// A stack on which thread after thread runs: sanitizers take long to make one.
struct Fiber {
  char* stack = static_cast<char*>(std::aligned_alloc(4096, kStackBytes));
  Context context;
  Fiber();
  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(context.tsan_fiber);
#endif
    std::free(stack);
  }
  Fiber(const Fiber&) = delete;
};

struct Place {  // an instruction that waits
  const char* name = "";
  std::source_location at;
  bool operator==(const Place& other) const {
    return !std::strcmp(name, other.name) && at.line() == other.at.line() &&
           !std::strcmp(at.file_name(), other.at.file_name());
  }
  std::string text() const {
    return std::string(name) + " at " + at.file_name() + ":" + std::to_string(at.line());
  }
};

// Threads that meet: those of a block at a barrier, or of a warp at a warp instruction. Two tokens
// and two rows of slots, used in turns: who is late at one meeting still finds its data there, since
// nobody leaves the next one before it came.
struct Meeting {
  struct alignas(16) Slot {
    unsigned char bytes[64];
  };
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  Place place;
  char token[2] = {};
  Slot slots[2][kWarp] = {};
};

struct Copy {  // of an unfinished cp.async: `bytes` from `source`, zeros up to 16
  void* target;
  const void* source;
  int bytes;
};

struct Thread {
  uint3 index{};
  int linear = 0;
  bool done = false;
  Fiber* fiber = nullptr;
  Meeting* warp = nullptr;
  const Meeting* waits_for = nullptr;
  unsigned waits_in = 0;  // generation
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
  int lane() const { return linear % kWarp; }
  bool can_run() const { return !done && !(waits_for && waits_for->generation == waits_in); }
};

struct Block {
  dim3 grid, size;
  uint3 index{};
  std::function<void()> kernel;
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting barrier;
  int votes[2] = {};
  Context main;
  char start_token = 0, end_token = 0;
  std::string error;
};

inline Block* block = nullptr;     // the one that runs
inline Thread* current = nullptr;  // its thread that runs
inline uint64_t seed = 0;          // of the order of threads and blocks
inline int64_t launches = 0;       // so far

// What the runner itself does, and no kernel: ThreadSanitizer must not compare it with anything.
#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize_thread))
#else
#define CUDA_ON_CPU_UNWATCHED
#endif

CUDA_ON_CPU_UNWATCHED inline void switch_context(Context& from, Context& to,
                                                 [[maybe_unused]] const void* stack,
                                                 [[maybe_unused]] size_t stack_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, stack, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  fiber_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// Back to the launching thread, until it goes on with this fiber.
CUDA_ON_CPU_UNWATCHED inline void leave() {
  switch_context(current->fiber->context, block->main, nullptr, 0);
}

inline std::string describe(const Thread& t) {
  return "thread (" + std::to_string(t.index.x) + "," + std::to_string(t.index.y) + "," +
         std::to_string(t.index.z) + ")";
}

// Stops the launch with an exception, thrown by the launching thread; this fiber never goes on.
[[noreturn]] inline void fail(const std::string& what) {
  if (block->error.empty()) block->error = what;
  leave();
  std::abort();
}

// Waits until all expected threads have come here; `orders` memory accesses as barriers do. Returns
// the row of slots of this meeting.
inline int meet(Meeting& m, const Place& place, bool orders) {
  const unsigned generation = m.generation;
  if (orders) release(&m.token[generation & 1]);
  if (m.arrived && !(m.place == place))
    fail(describe(*current) + " waits at " + place.text() + ", others at " + m.place.text());
  m.place = place;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    ++m.generation;
  } else {
    current->waits_for = &m;
    current->waits_in = generation;
    leave();
    current->waits_for = nullptr;
  }
  if (orders) acquire(&m.token[generation & 1]);
  return generation & 1;
}

// Each lane of the warp hands in `value`; `pick` makes this lane's result of a function that gives
// any lane's value.
template <class T, class Pick>
auto warp_exchange(const Place& place, unsigned mask, const T& value, Pick pick) {
  static_assert(sizeof(T) <= sizeof(Meeting::Slot));
  Unwatched unwatched;
  if (mask != 0xffffffffu) fail(place.text() + ": only full warps can be run on a CPU");
  Meeting& warp = *current->warp;
  std::memcpy(&warp.slots[warp.generation & 1][current->lane()], &value, sizeof(T));
  const int row = meet(warp, place, false);
  return pick([&](int lane) {
    T result;
    std::memcpy(&result, &warp.slots[row][lane & (kWarp - 1)], sizeof(T));
    return result;
  });
}

// ---- Launches -----------------------------------------------------------------------------------

inline void run_threads() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {  // a thread of each block
    acquire(&block->start_token);
    block->kernel();
    {
      Unwatched unwatched;
      if (!current->open.empty() || !current->committed.empty())
        fail(describe(*current) + " ends with a cp.async that it never waited for");
      release(&block->end_token);
      current->done = true;
    }
    leave();
  }
}

inline Fiber::Fiber() {
  // What `fiber_switch` pops: control words, six registers, the address to return to. Behind that,
  // the stack is 8 off an address aligned to 16, as where a function begins.
  auto* frame = reinterpret_cast<void**>(stack + kStackBytes - 136);
  std::memset(frame, 0, 9 * sizeof(void*));
  asm("stmxcsr %0" : "=m"(*reinterpret_cast<uint32_t*>(frame)));
  asm("fnstcw %0" : "=m"(*(reinterpret_cast<uint16_t*>(frame) + 2)));
  frame[7] = reinterpret_cast<void*>(&run_threads);
  context.stack_pointer = frame;
#if defined(__SANITIZE_THREAD__)
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

// Why threads that have not ended cannot go on.
inline std::string stuck(const Block& b) {
  const Thread *waiting = nullptr, *ended = nullptr;
  for (const Thread& t : b.threads) (t.done ? ended : waiting) = &t;
  std::string text = describe(*waiting) + " waits at " + waiting->waits_for->place.text();
  for (const Thread& t : b.threads)
    if (!t.done && t.waits_for != waiting->waits_for)
      return text + ", " + describe(t) + " at " + t.waits_for->place.text();
  return ended ? text + ", but " + describe(*ended) + " has ended" : text;
}

inline void run_block(Block& b, std::deque<Fiber>& fibers, std::mt19937_64& random) {
  const int n = static_cast<int>(b.threads.size());
  b.warps.assign(n / kWarp, Meeting{});
  for (Meeting& warp : b.warps) warp.expected = kWarp;
  b.barrier = Meeting{};
  b.barrier.expected = n;
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) {
    Thread& t = b.threads[i] = Thread{};
    t.linear = order[i] = i;
    t.index = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    t.warp = &b.warps[i / kWarp];
    t.fiber = &fibers[i];
  }
  release(&b.start_token);
  bool progress = true;
  while (progress && b.error.empty()) {
    progress = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      current = &b.threads[i];
      if (!current->can_run()) continue;
      progress = true;
      switch_context(b.main, fibers[i].context, fibers[i].stack, kStackBytes);
      if (!b.error.empty()) break;
    }
  }
  acquire(&b.end_token);
  const auto running = [](const Thread& t) { return !t.done; };
  if (b.error.empty() && std::any_of(b.threads.begin(), b.threads.end(), running))
    b.error = stuck(b);
}

// Runs a whole grid; returns when it is done.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 size,
            size_t shared_bytes, cudaStream_t, Args... args) {
  Unwatched unwatched;
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  ++launches;
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(name + why); };
  const int64_t threads = int64_t{size.x} * size.y * size.z;
  if (threads % kWarp || threads < 1 || threads > 1024 || size.z > 64)
    refuse(": a block must have 32, 64, ... 1024 threads, got " + std::to_string(threads));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    refuse(": the grid must be within 1..2^31-1, 1..65535, 1..65535");

  static std::deque<Fiber> fibers;
  while (fibers.size() < static_cast<size_t>(threads)) fibers.emplace_back();
  Block b;
  b.grid = grid;
  b.size = size;
  b.kernel = [&] { kernel(static_cast<Parameters>(args)...); };
  b.threads.resize(threads);
#if defined(__SANITIZE_THREAD__)
  b.main.tsan_fiber = __tsan_get_current_fiber();
#endif
  block = &b;
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (unsigned i : order) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, shared_bytes)) throw std::bad_alloc();
    std::memset(shared, 0xff, shared_bytes);
    b.shared = static_cast<unsigned char*>(shared);
    b.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(b, fibers, random);
    std::free(shared);
    if (b.error.empty()) continue;
    fibers.clear();  // some stopped amid a kernel
    refuse(", block (" + std::to_string(b.index.x) + "," + std::to_string(b.index.y) + "," +
           std::to_string(b.index.z) + "): " + b.error);
  }
  block = nullptr;
}

}  // namespace cuda_on_cpu

// ---- CUDA as kernels write it -------------------------------------------------------------------

#define DYN_SMEM(name) unsigned char* const name = cuda_on_cpu::block->shared
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  cuda_on_cpu::launch(#kernel, kernel, grid, block, smem, stream, __VA_ARGS__)
#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::block->index)
#define blockDim (cuda_on_cpu::block->size)
#define gridDim (cuda_on_cpu::block->grid)

using SourceLine = std::source_location;

inline void __syncthreads(SourceLine at = SourceLine::current()) {
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::meet(cuda_on_cpu::block->barrier, {"__syncthreads", at}, true);
}

inline int __syncthreads_or(int vote, SourceLine at = SourceLine::current()) {
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::Meeting& barrier = cuda_on_cpu::block->barrier;
  int& votes = cuda_on_cpu::block->votes[barrier.generation & 1];
  if (!barrier.arrived) votes = 0;
  votes |= vote != 0;
  cuda_on_cpu::meet(barrier, {"__syncthreads_or", at}, true);
  return votes;
}

inline void __syncwarp(SourceLine at = SourceLine::current()) {
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::meet(*cuda_on_cpu::current->warp, {"__syncwarp", at}, true);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, SourceLine at = SourceLine::current()) {
  return cuda_on_cpu::warp_exchange({"__shfl_sync", at}, mask, value,
                                    [&](auto value_of) { return value_of(lane); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, SourceLine at = SourceLine::current()) {
  const int from = cuda_on_cpu::current->lane() ^ bits;
  return cuda_on_cpu::warp_exchange({"__shfl_xor_sync", at}, mask, value,
                                    [&](auto value_of) { return value_of(from); });
}

inline unsigned __ballot_sync(unsigned mask, int vote, SourceLine at = SourceLine::current()) {
  return cuda_on_cpu::warp_exchange({"__ballot_sync", at}, mask, vote != 0, [](auto value_of) {
    unsigned bits = 0;
    for (int i = 0; i < cuda_on_cpu::kWarp; ++i) bits |= static_cast<unsigned>(value_of(i)) << i;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int vote, SourceLine at = SourceLine::current()) {
  return __ballot_sync(mask, vote, at) != 0;
}
inline int __all_sync(unsigned mask, int vote, SourceLine at = SourceLine::current()) {
  return __ballot_sync(mask, vote, at) == 0xffffffffu;
}

// Relaxed, as on a GPU: ThreadSanitizer sees a race between them and plain accesses.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

inline void __threadfence() {}
using std::max;
using std::min;
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.0f : a / b; }
