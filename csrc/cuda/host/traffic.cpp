// Counts what kernels read and write in global memory while the host runner executes them.
//
// The kernels are compiled with -fsanitize=thread, whose compiler pass calls a function at every
// memory access, and linked with these functions instead of ThreadSanitizer. Memory is counted in
// sectors of 32 bytes, as GPUs fetch it, by the rules of benchmarks/static_report/traffic.py: a
// sector counts once a launch, however many blocks touch it, unless only one block does and has
// touched kNear bytes since: its share of the L2 cache is used up by then. Threads that run one after
// another here run together on a GPU: between two barriers it is for one thread alone that the others'
// bytes lie in between. Between launches nothing stays.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

constexpr uintptr_t kSector = 32;
constexpr int64_t kNear = 64 * 1024;  // 40 MB of L2 (A100) for some 640 blocks that run at a time

struct Range {
  uintptr_t begin, end;
};
struct Sector {
  int64_t touched = -1, block = -1;  // when last, in bytes that went by, and by whom
  int64_t phase = -1;                // barriers of the block before that
  int thread = -1;                   // the first one in that phase
  int64_t reads = 0, writes = 0;
  bool shared = false;
};

std::vector<Range> ranges;
std::unordered_map<uintptr_t, Sector> sectors;  // of this launch
int64_t launch_now = -1, clock_now = 0, bytes_read = 0, bytes_written = 0;

void finish_launch() {
  for (const auto& [_, s] : sectors) {
    bytes_read += kSector * (s.shared ? std::min<int64_t>(s.reads, 1) : s.reads);
    bytes_written += kSector * (s.shared ? std::min<int64_t>(s.writes, 1) : s.writes);
  }
  sectors.clear();
  clock_now = 0;
}

void touch(const void* address, uintptr_t size, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  static size_t last = 0;
  const auto inside = [&](const Range& r) { return begin >= r.begin && begin < r.end; };
  if (last >= ranges.size() || !inside(ranges[last])) {
    last = std::find_if(ranges.begin(), ranges.end(), inside) - ranges.begin();
    if (last == ranges.size()) return;  // shared memory, a stack, the runner's own
  }
  const cuda_on_cpu::Block* block = cuda_on_cpu::block;
  if (!block) return;
  if (launch_now != cuda_on_cpu::launches) finish_launch();
  launch_now = cuda_on_cpu::launches;
  const uint3 i = block->index;
  const int64_t number = (int64_t{i.z} * block->grid.y + i.y) * block->grid.x + i.x;
  const int64_t phase = block->barrier.generation;
  const int thread = cuda_on_cpu::current->linear;
  for (uintptr_t at = begin / kSector; at * kSector < begin + size; ++at) {
    Sector& s = sectors[at];
    s.shared |= s.touched >= 0 && s.block != number;
    const bool same_phase = s.block == number && s.phase == phase;
    const bool far = s.touched < 0 || clock_now - s.touched > kNear;
    const bool again = far && (!same_phase || s.thread == thread);
    if (!same_phase) s.thread = thread;
    s.phase = phase;
    if (write)
      s.writes += again || s.writes == 0;
    else
      s.reads += again;
    s.touched = clock_now;
    s.block = number;
  }
  clock_now += static_cast<int64_t>(size);
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) { return *at; }
void __tsan_read_range(void* at, long size) { touch(at, size, false); }
void __tsan_write_range(void* at, long size) { touch(at, size, true); }
#define ACCESS(size)                                                     \
  void __tsan_read##size(void* at) { touch(at, size, false); }           \
  void __tsan_write##size(void* at) { touch(at, size, true); }           \
  void __tsan_unaligned_read##size(void* at) { touch(at, size, false); } \
  void __tsan_unaligned_write##size(void* at) { touch(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
unsigned __tsan_atomic32_fetch_add(volatile unsigned* at, unsigned value, int) {
  return std::exchange(*at, *at + value);
}
unsigned __tsan_atomic32_fetch_or(volatile unsigned* at, unsigned value, int) {
  return std::exchange(*at, *at | value);
}
}

// Adds global memory: accesses elsewhere are not counted.
void watch(uintptr_t address, uintptr_t bytes) {
  const Range range{address, address + bytes};
  const auto same = [&](const Range& r) { return r.begin == range.begin && r.end == range.end; };
  if (bytes && std::none_of(ranges.begin(), ranges.end(), same)) ranges.push_back(range);
}

// Bytes read and written since the last call; forgets the watched memory.
std::pair<int64_t, int64_t> take() {
  finish_launch();
  ranges.clear();
  return {std::exchange(bytes_read, 0), std::exchange(bytes_written, 0)};
}

void register_traffic(pybind11::module_& m) {
  m.def("watch", &watch);
  m.def("take", [] {
    const auto [read, written] = take();
    return pybind11::make_tuple(read, written);
  });
}
