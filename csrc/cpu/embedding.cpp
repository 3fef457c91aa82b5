// An embedding, y_m = w_v with the token v = idx_m, and its gradient, dw_v = sum of the dy_m whose
// token is v.
//
// Backward sorts positions by their tokens first (a counting sort, so that equal tokens stay in
// order). Then each row of dw belongs to one task, which sums it in fp32 in that order, however many
// threads there are, and writes it once; rows that no token names become zero. Tasks are pieces of
// the vocabulary with about as much to read and write each, cut once more into blocks of columns for
// the sake of tokens so frequent that one of them is most of the work.
#include <algorithm>
#include <atomic>
#include <utility>

#include "isa.h"
#include "parallel.h"
#include "stream.h"

// w is (V, row_bytes), idx (N,) int64, y (N, row_bytes). Returns the first position whose token is
// outside [0, V), after which y may not be written; or N.
DECLARE_KERNEL(embedding_fwd, int64_t(const void* w, const int64_t* idx, void* y, int64_t N,
                                      int64_t V, int64_t row_bytes))
// dy is (N, C), idx (N,) int64, dw (V, C). Tokens outside [0, V) and padding_idx give nothing.
DECLARE_KERNEL(embedding_bwd, void(const void* dy, const int64_t* idx, void* dw, int64_t N,
                                   int64_t C, int64_t V, int64_t padding_idx, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrainBytes = 65536;    // copied by a thread: some 5 us
constexpr int64_t kColumns = 512;         // 1 or 2 KB of a row: long enough for the prefetcher
constexpr int64_t kTaskElements = 65536;  // some 30 us of reading and writing: many forks' worth

int64_t embedding_fwd(const void* w, const int64_t* idx, void* y, int64_t N, int64_t V,
                      int64_t row_bytes) {
  const char* rows = static_cast<const char*>(w);
  char* out = static_cast<char*>(y);
  std::atomic<int64_t> first_wrong{N};
  parallel_for(N, kGrainBytes / (row_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (idx[m] >= 0 && idx[m] < V) {
        std::memcpy(out + m * row_bytes, rows + idx[m] * row_bytes, row_bytes);
        continue;
      }
      for (int64_t least = first_wrong;
           m < least && !first_wrong.compare_exchange_weak(least, m);) {
      }
      return;
    }
  });
  return first_wrong;
}

// first[v] to first[v + 1] are where `order` has the positions of token v.
void sort_by_token(const int64_t* idx, int64_t N, int64_t V, int64_t padding_idx, int64_t* first,
                   int64_t* order) {
  auto counts = [&](int64_t token) { return token >= 0 && token < V && token != padding_idx; };
  std::fill(first, first + V + 1, 0);
  for (int64_t m = 0; m < N; ++m)
    if (counts(idx[m])) ++first[idx[m]];
  int64_t total = 0;
  for (int64_t v = 0; v <= V; ++v) total += std::exchange(first[v], total);
  for (int64_t m = 0; m < N; ++m)
    if (counts(idx[m])) order[first[idx[m]]++] = m;
  // Each entry has moved to where the next one began.
  for (int64_t v = V; v > 0; --v) first[v] = first[v - 1];
  first[0] = 0;
}

template <class T>
void backward(const T* dy, const int64_t* idx, T* dw, int64_t N, int64_t C, int64_t V,
              int64_t padding_idx) {
  static thread_local Scratch scratch;
  int64_t* first = scratch.reserve<int64_t>(V + 1 + N);
  int64_t* order = first + V + 1;
  sort_by_token(idx, N, V, padding_idx, first, order);

  // Row v costs a write and its reads; piece i begins where the rows before cost i / pieces of all.
  const int64_t cost = V + first[V], blocks = (C + kColumns - 1) / kColumns;
  const int64_t pieces = larger(1, smaller(V, cost * C / kTaskElements));
  auto begin_of = [&](int64_t piece) {
    const int64_t wanted = cost * piece / pieces;
    int64_t low = 0, high = V;  // the least v with v + first[v] >= wanted
    while (low < high) {
      const int64_t v = (low + high) / 2;
      v + first[v] < wanted ? low = v + 1 : high = v;
    }
    return low;
  };
  with_stores(dw, V, C, [&](auto out) {
    parallel_for_dynamic(pieces * blocks, cost * C, [&](int64_t task) {
      const int64_t begin = begin_of(task / blocks), end = begin_of(task / blocks + 1);
      const int64_t column = task % blocks * kColumns, n = smaller(kColumns, C - column);
      alignas(64) float sum[kColumns];
      for (int64_t v = begin; v < end; ++v) {
        std::memset(sum, 0, n * sizeof(float));
        for (int64_t i = first[v]; i < first[v + 1]; ++i) {
          const T* from = dy + order[i] * C + column;
          for_each_vector(n, [&](int64_t j, auto part) {
            part.store(sum + j, part.load(sum + j) + part.load(from + j));
          });
        }
        T* to = dw + v * C + column;
        for_each_vector(n,
                        [&](int64_t j, auto part) { out.store(part, to + j, part.load(sum + j)); });
      }
      finish_stores();
    });
  });
}

void embedding_bwd(const void* dy, const int64_t* idx, void* dw, int64_t N, int64_t C, int64_t V,
                   int64_t padding_idx, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    backward(static_cast<const T*>(dy), idx, static_cast<T*>(dw), N, C, V, padding_idx);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(embedding_fwd)
REGISTER_KERNEL(embedding_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_embedding(pybind11::module_& m) {
  gptfast::bind_kernel(m, "embedding_fwd", gptfast::kernel_embedding_fwd);
  gptfast::bind_kernel(m, "embedding_bwd", gptfast::kernel_embedding_bwd);
}
#endif
