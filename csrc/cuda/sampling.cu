// The next token of each row of logits, B rows of V: all of it in one launch. The maths stands in
// gptfast/ops/sample.py.
//
// One block per row, which reads the row from the caches again for every question: what is the
// highest logit; which is the last token that top_k, and then top_p, keeps; which warp's tokens, and
// which token among them, has the drawn place. Nothing but tokens is written. Each warp has a stretch
// of neighbouring tokens, of which its lanes take packs of 16 bytes in turns.
//
// Weights are whole numbers, so their sums are exact in any order, and so are those that atomics add.
#include "../common/sampling.h"
#include "common.cuh"
#include "launchers.h"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 2048, kBinsPerThread = kBins / kThreads;
// Amounts are added up in three parts of 14 bits, each by the atomics of 32 bits that shared memory
// has: 2^18 tokens fill them.
constexpr int kParts = 3, kPartBits = 14;
constexpr int64_t kMostTokens = 1 << 18;

// The tokens that are kept: those with a higher key, and with this key up to the token `last`.
struct Cut {
  uint32_t key;
  int64_t last;
  __device__ __forceinline__ bool keeps(uint32_t other, int64_t v) const {
    return other > key || (other == key && v <= last);
  }
};

// What the threads of a block share.
struct Shared {
  uint32_t bins[kParts][kBins];
  uint64_t of_warp[kWarps];
  uint64_t found[2];
};

struct SumOf {
  static __device__ __forceinline__ uint64_t of(uint64_t a, uint64_t b) { return a + b; }
};
struct HighestOf {
  static __device__ __forceinline__ uint64_t of(uint64_t a, uint64_t b) { return a > b ? a : b; }
};
struct LowestOf {
  static __device__ __forceinline__ uint64_t of(uint64_t a, uint64_t b) { return a < b ? a : b; }
};

template <class Op>
__device__ __forceinline__ uint64_t reduce_warp(uint64_t x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x = Op::of(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// Leaves each warp's x in shared.of_warp; returns that of the block, to all threads.
template <class Op>
__device__ __forceinline__ uint64_t reduce_block(uint64_t x, Shared& shared) {
  x = reduce_warp<Op>(x);
  __syncthreads();  // what the call before left here has been read
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared.of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) x = Op::of(x, shared.of_warp[warp]);
  return x;
}

// The sum of x in this lane and those before it.
__device__ __forceinline__ uint64_t sum_up_to_lane(uint64_t x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_sync(kAllLanes, x, lane < step ? 0 : lane - step);
    if (lane >= step) x += other;
  }
  return x;
}

template <class T>
struct Row {
  static constexpr int kWidth = kFullWidth<T>;
  const T* logits;
  int64_t V;
  const uint32_t* seen;  // a bit for each token that was there before; null: none was
  float penalty;
  int64_t ahead;  // elements between the aligned address before the row and the row

  // Calls body(v, z) for the packs of this warp's stretch, tokens v, v + 1, ... with logits z, of its
  // 32 lanes at a time. Minus infinity stands where there is no token. `body` ends the walk by false.
  template <class Body>
  __device__ __forceinline__ void walk(const Body& body) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t rounds = ceil_div(V + ahead, int64_t{kThreads * kWidth});
    int64_t v = (warp * rounds * 32 + lane) * kWidth - ahead;
    for (int64_t i = 0; i < rounds; ++i, v += 32 * kWidth) {
      float z[kWidth];
      if (v >= 0 && v + kWidth <= V) {
        const auto pack = load<kWidth>(logits + v);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) z[k] = penalised(pack[k], v + k);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          z[k] = v + k >= 0 && v + k < V ? penalised(to_float(logits[v + k]), v + k) : -INFINITY;
      }
      if (!body(v, z)) return;
    }
  }

  // __fmul_rn: the product is not to be fused with the subtraction that follows.
  __device__ __forceinline__ float penalised(float z, int64_t v) const {
    if (!seen || !(seen[v / 32] >> (v % 32) & 1)) return z;
    return z < 0.0f ? __fmul_rn(z, penalty) : __fdiv_rn(z, penalty);
  }
};

template <class T>
struct Sampler {
  Row<T> row;
  SamplingRule rule;
  Shared& shared;
  float top = 0.0f;

  __device__ __forceinline__ uint64_t weight(float z) const {
    return token_weight(top - z, rule.steps);
  }
  __device__ __forceinline__ uint64_t kept_weight(const Cut& cut, uint64_t min_weight, float z,
                                                  int64_t v) const {
    const uint64_t w = weight(z);
    return w >= min_weight && cut.keeps(rank_key(z), v) ? w : 0;
  }

  // The sum of the weights that are kept; that of each warp in shared.of_warp.
  __device__ __forceinline__ uint64_t total(const Cut& cut, uint64_t min_weight) const {
    uint64_t sum = 0;
    row.walk([&](int64_t v, const auto& z) {
#pragma unroll
      for (int k = 0; k < Row<T>::kWidth; ++k) sum += kept_weight(cut, min_weight, z[k], v + k);
      return true;
    });
    return reduce_block<SumOf>(sum, shared);
  }

  // The token, in the order of tokens, in which the sum of amount(z, v) passes `place`.
  template <class Amount>
  __device__ __forceinline__ int64_t token_at(uint64_t place, const Amount& amount) const {
    int warp = 0;  // of_warp has the amounts of the warps
    for (; warp < kWarps - 1 && shared.of_warp[warp] <= place; ++warp)
      place -= shared.of_warp[warp];
    if (static_cast<int>(threadIdx.x) / 32 == warp)
      row.walk([&](int64_t v, const auto& z) {
        uint64_t own = 0;
#pragma unroll
        for (int k = 0; k < Row<T>::kWidth; ++k) own += amount(z[k], v + k);
        const uint64_t up_to = sum_up_to_lane(own), all = __shfl_sync(kAllLanes, up_to, 31);
        if (place < up_to && place >= up_to - own) {  // one lane
          uint64_t left = place - (up_to - own);
          bool here = false;
#pragma unroll
          for (int k = 0; k < Row<T>::kWidth; ++k) {
            const uint64_t a = amount(z[k], v + k);
            if (!here && left < a) shared.found[0] = static_cast<uint64_t>(v + k);
            here = here || left < a;
            left -= here ? 0 : a;
          }
        }
        const bool goes_on = place >= all;
        place -= all;
        return goes_on;
      });
    __syncthreads();
    return static_cast<int64_t>(shared.found[0]);
  }

  // Where tokens are kept in the order of their keys until their amounts reach `wanted`: found digit
  // by digit of the key, highest first.
  template <class Amount>
  __device__ __forceinline__ Cut cut(uint64_t wanted, const Amount& amount) const {
    uint64_t before = 0, prefix = 0;
    for (int level = 0; level < 3; ++level) {
      const int bits = level == 2 ? 10 : 11, shift = level == 0 ? 21 : level == 1 ? 10 : 0;
      for (auto& bins : shared.bins)
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      row.walk([&](int64_t, const auto& z) {
#pragma unroll
        for (int k = 0; k < Row<T>::kWidth; ++k) {
          const uint32_t key = rank_key(z[k]);
          if (uint64_t{key} >> (shift + bits) != prefix) continue;
          const uint64_t a = amount(weight(z[k]));
          const uint32_t bin = key >> shift & ((1u << bits) - 1);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const uint32_t piece = a >> (part * kPartBits) & ((1u << kPartBits) - 1);
            if (piece) atomicAdd(&shared.bins[part][bin], piece);
          }
        }
        return true;
      });
      __syncthreads();
      find_bin(wanted, before);
      prefix = prefix << bits | shared.found[0];
      before = shared.found[1];
    }
    // Of the tokens with this key, the first ones.
    const auto key = static_cast<uint32_t>(prefix);
    const uint64_t each = amount(weight(float_of_key(key)));
    const auto one = [key](float z, int64_t) { return uint64_t{rank_key(z) == key}; };
    uint64_t count = 0;
    row.walk([&](int64_t v, const auto& z) {
#pragma unroll
      for (int k = 0; k < Row<T>::kWidth; ++k) count += one(z[k], v + k);
      return true;
    });
    count = reduce_block<SumOf>(count, shared);
    const uint64_t kept = (wanted - before + each - 1) / each;
    return {key, kept >= count ? row.V : token_at(kept - 1, one)};
  }

  // Leaves in shared.found the bin in which the amounts, from the highest bin on, reach `wanted`, and
  // the amount of the bins above it. A thread has a few neighbouring bins, the first one the highest.
  __device__ __forceinline__ void find_bin(uint64_t wanted, uint64_t before) const {
    const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    const auto amount = [&](int bin) {
      uint64_t a = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        a += uint64_t{shared.bins[part][bin]} << (part * kPartBits);
      return a;
    };
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) own += amount(first - i);
    const uint64_t up_to = sum_up_to_lane(own);
    if (threadIdx.x % 32 == 31) shared.of_warp[threadIdx.x / 32] = up_to;
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp)
      before += shared.of_warp[warp];
    before += up_to - own;
    if (before < wanted && wanted <= before + own) {  // one thread
      int bin = first;
      for (; before + amount(bin) < wanted; --bin) before += amount(bin);
      shared.found[0] = static_cast<uint64_t>(bin);
      shared.found[1] = before;
    }
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const T* logits, int64_t stride_row, const int64_t* previous,
                  int64_t stride_previous, int64_t P, int64_t* tokens, int64_t V, SamplingRule rule,
                  uint64_t seed, uint64_t offset) {
  DYN_SMEM(bytes);
  auto& shared = *reinterpret_cast<Shared*>(bytes);
  const int64_t b = blockIdx.x;
  logits += b * stride_row;
  const auto ahead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  auto* seen = reinterpret_cast<uint32_t*>(bytes + sizeof(Shared));
  if (P > 0) {
    for (int64_t i = threadIdx.x; i < ceil_div(V, int64_t{32}); i += kThreads) seen[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < P; i += kThreads) {
      const int64_t v = previous[b * stride_previous + i];
      if (v >= 0 && v < V) atomicOr(&seen[v / 32], 1u << (v % 32));
    }
    __syncthreads();
  }
  Sampler<T> sampler{{logits, V, P > 0 ? seen : nullptr, rule.penalty, ahead}, rule, shared};
  const Row<T>& row = sampler.row;

  uint64_t highest = 0;
  row.walk([&](int64_t, const auto& z) {
#pragma unroll
    for (int k = 0; k < Row<T>::kWidth; ++k) highest = HighestOf::of(highest, rank_key(z[k]));
    return true;
  });
  highest = reduce_block<HighestOf>(highest, shared);
  int64_t token = -1;
  if (highest < kKeyOfInfinity && highest > kKeyOfMinusInfinity) {
    if (rule.steps == 0.0f) {
      uint64_t first = static_cast<uint64_t>(V);
      row.walk([&](int64_t v, const auto& z) {
#pragma unroll
        for (int k = 0; k < Row<T>::kWidth; ++k)
          if (rank_key(z[k]) == highest) first = LowestOf::of(first, static_cast<uint64_t>(v + k));
        return true;
      });
      token = static_cast<int64_t>(reduce_block<LowestOf>(first, shared));
    } else {
      sampler.top = float_of_key(static_cast<uint32_t>(highest));
      Cut cut{0, V};
      if (rule.top_k < V)
        cut = sampler.cut(static_cast<uint64_t>(rule.top_k), [](uint64_t) { return uint64_t{1}; });
      uint64_t total = sampler.total(cut, 0);
      const uint64_t wanted = share_of(total, rule.share);
      if (wanted < total) {
        // The last kept token and those behind it weigh more than total - wanted together: what is
        // lighter than its share of that is not the last one, and most tokens are.
        const uint64_t least = (total - wanted) / static_cast<uint64_t>(rule.top_k);
        cut = sampler.cut(wanted, [least](uint64_t w) { return w < least ? uint64_t{0} : w; });
      }
      if (wanted < total || rule.min_weight > 0) total = sampler.total(cut, rule.min_weight);
      const Philox random = philox(static_cast<uint32_t>(b), static_cast<uint32_t>(offset),
                                   static_cast<uint32_t>(offset >> 32), 1, seed);
      token = sampler.token_at(
          place_in(total, random.word[0], random.word[1]),
          [&](float z, int64_t v) { return sampler.kept_weight(cut, rule.min_weight, z, v); });
    }
  }
  if (threadIdx.x == 0) tokens[b] = token;
}

}  // namespace

void sample(const void* logits, int64_t stride_row, const int64_t* previous,
            int64_t stride_previous, int64_t P, int64_t* tokens, int64_t B, int64_t V,
            float penalty, float steps, int64_t top_k, int64_t share, int64_t min_weight,
            uint64_t seed, uint64_t offset, DType dtype, cudaStream_t stream) {
  if (B == 0) return;
  if (V < 1 || V > kMostTokens)
    throw std::runtime_error("sample: a row must have 1 to 2^18 logits, got " + std::to_string(V));
  const SamplingRule rule{penalty, steps, top_k, share, static_cast<uint64_t>(min_weight)};
  const size_t shared_bytes =
      sizeof(Shared) + (P > 0 ? static_cast<size_t>(ceil_div(V, int64_t{32})) * 4 : 0);
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    LAUNCH((sample_kernel<T>), grid_of(B), kThreads, shared_bytes, stream,
           static_cast<const T*>(logits), stride_row, previous, stride_previous, P, tokens, V, rule,
           seed, offset);
  });
}

}  // namespace gptfast::cuda
