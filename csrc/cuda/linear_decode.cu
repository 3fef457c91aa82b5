// y = act(x W^T + b) for a few rows of x, M rows of K values, N output channels. The maths and the
// layout of quantised weights stand in gptfast/ops/linear_decode.py.
//
// W is read once for up to 16 rows, in the order in which it lies in memory. A panel of 16 channels
// belongs to one, two or four warps of a block, which take turns along K; of a warp's lanes, four
// share the channels and eight walk along K, each with four loads of 16 bytes a step. The rows of x
// stand in shared memory in fp32, as much of them as fits. Products and sums are fp32 with weights as
// they are stored: an integer becomes a float by its place in the mantissa of 2^23, and an int4 times
// its scale, 4 bits times 8, is exact.
#include "activation.cuh"
#include "common.cuh"
#include "launchers.h"

namespace gptfast::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPanel = 16;       // output channels
constexpr int kGroup = 32;       // weights of one int4 scale
constexpr int kChannels = 4;     // of a lane
constexpr int kLanesAlongK = 8;  // lanes with the same channels
constexpr int kLoads = 4;        // of 16 bytes, a lane and step
constexpr int kMostRows = 16;    // that are multiplied at once
constexpr int kShared = 8192;    // elements of x in shared memory: 32 KiB, without asking for more
constexpr float kOffset = 0x1p23f;

enum class WeightFormat : int { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

struct Weight {
  const void* data;
  const void* scale;    // int8: fp32 (N); int4: bf16 (N / 16, K / 32, 16)
  const uint8_t* zero;  // int4: (N / 16, K / 32, 16), or null, which means 8
  int64_t N, K;
  bool aligned;  // whether rows of floats are aligned to 16 bytes
};

// A whole number below 2^23, given in the low bits, less `offset` + 2^23.
__device__ __forceinline__ float small_integer(uint32_t bits, float offset) {
  const uint32_t pattern = bits | 0x4b000000u;
  float value;
  memcpy(&value, &pattern, sizeof value);
  return value - offset;
}

// Four words of a 16-byte load: one for each channel of the lane.
struct alignas(16) Words {
  uint32_t of[kChannels];
};

// What a lane loads in a step, and the weights in it: of channel c at k + j, j up to kDepth.
template <class T>
struct FloatSteps {
  static constexpr int kDepth = kFullWidth<T>;
  static constexpr bool kScaled = false;
  Pack<T, kDepth> at[kChannels];

  static __host__ __device__ __forceinline__ int64_t depth(int64_t K) { return K; }
  __device__ __forceinline__ void load(const Weight& w, int64_t panel, int quad, int64_t k) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t n = panel * kPanel + quad * kChannels + c;
      const T* from = static_cast<const T*>(w.data) + n * w.K + k;
      if (w.aligned && n < w.N) {
        at[c] = cuda::load<kDepth>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kDepth; ++j)
          at[c].value[j] = n < w.N && k + j < w.K ? from[j] : from_float<T>(0.0f);
      }
    }
  }
  __device__ __forceinline__ float weight(int c, int j) const { return at[c][j]; }
};

struct Int8Steps {
  static constexpr int kDepth = 4 * kLoads;
  static constexpr bool kScaled = true;  // by a scale for each channel, in the end
  Words at[kLoads];

  static __host__ __device__ __forceinline__ int64_t depth(int64_t K) { return (K + 63) / 64 * 64; }
  __device__ __forceinline__ void load(const Weight& w, int64_t panel, int quad, int64_t k) {
    const auto* from = static_cast<const Words*>(w.data) + panel * depth(w.K) + k + quad;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i] = from[i * 4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) at[i].of[c] ^= 0x80808080u;  // 128 + w, without a sign
    }
  }
  __device__ __forceinline__ float weight(int c, int j) const {
    return small_integer(at[j / 4].of[c] >> (8 * (j % 4)) & 0xffu, kOffset + 128);
  }
};

struct Int4Steps {
  static constexpr int kDepth = kGroup;
  static constexpr bool kScaled = false;
  Words at[kLoads];
  float scale[kChannels], offset[kChannels];

  static __host__ __device__ __forceinline__ int64_t depth(int64_t K) {
    return (K + kGroup - 1) / kGroup * kGroup;
  }
  __device__ __forceinline__ void load(const Weight& w, int64_t panel, int quad, int64_t k) {
    const int64_t groups = depth(w.K) / kGroup, group = panel * groups + k / kGroup;
    const auto* from = static_cast<const Words*>(w.data) + group * (kGroup / 2) + quad;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) at[i] = from[i * 4];
    const int64_t first = group * kPanel + quad * kChannels;
    const auto s = cuda::load<kChannels>(static_cast<const __nv_bfloat16*>(w.scale) + first);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      scale[c] = s[c];
      offset[c] = kOffset + 8;
    }
    if (w.zero) {
      const uint32_t zeros = *reinterpret_cast<const uint32_t*>(w.zero + first);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        offset[c] = kOffset + static_cast<float>(zeros >> (8 * c) & 0xffu);
    }
  }
  __device__ __forceinline__ float weight(int c, int j) const {
    const int bit = 8 * (j % 4) + (j % 8 < 4 ? 0 : 4);
    return small_integer(at[j / 8].of[c] >> bit & 15u, offset[c]) * scale[c];
  }
};

// Where element k of a row stands in shared memory: 16 bytes are left free behind every 128, so that
// lanes 4, 8, 16 or 32 elements apart read from different banks.
__host__ __device__ __forceinline__ int skewed(int k) { return k + k / 32 * 4; }

// Elements of a row in shared memory at a time, filled up with zeros.
__host__ __device__ __forceinline__ int elements_at_once(int rows, int64_t K) {
  const int64_t filled = (K + 63) / 64 * 64;
  return static_cast<int>(filled < kShared / rows ? filled : kShared / rows);
}

template <class T>
__device__ __forceinline__ void fill(float* to, const T* x, int64_t count, int filled) {
  for (int k = threadIdx.x; k < filled; k += kThreads)
    to[skewed(k)] = k < count ? to_float(x[k]) : 0.0f;
}

__device__ __forceinline__ void store_as(void* y, int64_t at, float value, DType dtype) {
  switch (dtype) {
    case DType::F32: static_cast<float*>(y)[at] = value; return;
    case DType::BF16: static_cast<__nv_bfloat16*>(y)[at] = from_float<__nv_bfloat16>(value); return;
    default: static_cast<__half*>(y)[at] = from_float<__half>(value);
  }
}

struct Activations {  // x and y
  const void* x;
  int64_t stride_x;
  void* y;
  int64_t M;
  DType dtype;

  // Row m from element k on, of which `count` are there, into shared memory.
  __device__ __forceinline__ void fill_row(float* to, int64_t m, int64_t k, int64_t count,
                                           int filled) const {
    const int64_t at = m * stride_x + k;
    switch (dtype) {
      case DType::F32: return fill(to, static_cast<const float*>(x) + at, count, filled);
      case DType::BF16: return fill(to, static_cast<const __nv_bfloat16*>(x) + at, count, filled);
      default: return fill(to, static_cast<const __half*>(x) + at, count, filled);
    }
  }
};

// blockIdx.x: panels; blockIdx.y: rows, kRows at a time.
template <class Steps, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    linear_decode_kernel(Activations a, Weight w, Parameter bias, int warps_per_panel,
                         bool gelu_tanh) {
  DYN_SMEM(bytes);
  __shared__ float sums[kWarps][kRows][kPanel];
  auto* x = reinterpret_cast<float*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane % 4, turn = warp % warps_per_panel * kLanesAlongK + lane / 4;
  const int64_t first_panel = int64_t{blockIdx.x} * (kWarps / warps_per_panel);
  const int64_t panel = first_panel + warp / warps_per_panel;
  const int64_t first_row = int64_t{blockIdx.y} * kRows, depth = Steps::depth(w.K);
  const int at_once = elements_at_once(kRows, w.K), stride = skewed(at_once);
  float acc[kRows][kChannels] = {};
  for (int64_t k0 = 0; k0 < w.K; k0 += at_once) {
    if (k0 > 0) __syncthreads();  // the elements before have been multiplied
    for (int m = 0; m < kRows; ++m)
      a.fill_row(x + m * stride, first_row + m, k0, first_row + m < a.M ? w.K - k0 : 0, at_once);
    __syncthreads();
    if (panel * kPanel >= w.N) continue;
    const int64_t left = depth - k0, end = left < at_once ? left : at_once;
    for (int k = turn * Steps::kDepth; k < end;
         k += warps_per_panel * kLanesAlongK * Steps::kDepth) {
      Steps steps;
      steps.load(w, panel, quad, k0 + k);
      const float* from = x + skewed(k);
#pragma unroll
      for (int j = 0; j < Steps::kDepth; j += 4) {
        float weight[4][kChannels];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) weight[i][c] = steps.weight(c, j + i);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const auto four = load<4>(from + m * stride + j);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) acc[m][c] += weight[i][c] * four[i];
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int bits = 4; bits < 32; bits *= 2)
        acc[m][c] += __shfl_xor_sync(kAllLanes, acc[m][c], bits);
      if (lane < 4) sums[warp][m][quad * kChannels + c] = acc[m][c];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < kWarps / warps_per_panel * kRows * kPanel; i += kThreads) {
    const int channel = i % kPanel, m = i / kPanel % kRows, which = i / (kPanel * kRows);
    const int64_t n = (first_panel + which) * kPanel + channel, row = first_row + m;
    if (n >= w.N || row >= a.M) continue;
    float z = 0.0f;
    for (int k = 0; k < warps_per_panel; ++k) z += sums[which * warps_per_panel + k][m][channel];
    if constexpr (Steps::kScaled) z *= static_cast<const float*>(w.scale)[n];
    if (bias.data) z += bias.at(n);
    store_as(a.y, row * w.N + n, gelu_tanh ? TanhGelu::value(z) : z, a.dtype);
  }
}

// Warps of a panel. With four panels a block reads x once for all of them; where that leaves the card
// empty (an H100 has 132 multiprocessors, and room for several blocks on each), four warps share one.
int pick_warps_per_panel(int64_t panels, int64_t steps) {
  constexpr int64_t kManyPanels = 2048;
  int warps = panels >= kManyPanels ? 1 : kWarps;
  while (warps > 1 && warps / 2 * kLanesAlongK >= steps) warps /= 2;  // none is without work
  return warps;
}

template <class Steps, int kRows>
void launch_rows(const Activations& a, const Weight& w, const Parameter& bias, bool gelu_tanh,
                 cudaStream_t stream) {
  const int64_t panels = ceil_div(w.N, int64_t{kPanel}), blocks = ceil_div(a.M, int64_t{kRows});
  if (blocks > 65535)
    throw std::runtime_error("linear_decode: at most 2^20 - 16 rows, got " + std::to_string(a.M));
  const int at_once = elements_at_once(kRows, w.K);
  const int warps =
      pick_warps_per_panel(panels, ceil_div(int64_t{at_once}, int64_t{Steps::kDepth}));
  const dim3 grid(grid_of(ceil_div(panels, int64_t{kWarps / warps})),
                  static_cast<unsigned>(blocks));
  LAUNCH((linear_decode_kernel<Steps, kRows>), grid, kThreads,
         sizeof(float) * kRows * skewed(at_once), stream, a, w, bias, warps, gelu_tanh);
}

template <class Steps>
void launch_steps(const Activations& a, const Weight& w, const Parameter& bias, bool gelu_tanh,
                  cudaStream_t stream) {
  const auto with = [&](auto rows) { launch_rows<Steps, rows>(a, w, bias, gelu_tanh, stream); };
  if (a.M <= 1) return with(std::integral_constant<int, 1>{});
  if (a.M <= 2) return with(std::integral_constant<int, 2>{});
  if (a.M <= 4) return with(std::integral_constant<int, 4>{});
  if (a.M <= 8) return with(std::integral_constant<int, 8>{});
  with(std::integral_constant<int, kMostRows>{});
}

}  // namespace

void linear_decode_fwd(const void* x, int64_t stride_x, const void* weight, const void* scale,
                       const uint8_t* zero, const void* bias, DType bias_dtype, void* y, int64_t M,
                       int64_t N, int64_t K, int format, int activation, DType dtype,
                       cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  const auto which = static_cast<WeightFormat>(format);
  if (which >= WeightFormat::INT8 && !aligned_16(weight, scale, zero))
    throw std::runtime_error("linear_decode: a quantised weight must be aligned to 16 bytes");
  const int64_t element = which == WeightFormat::F32 ? 4 : 2;
  const Weight w{weight, scale, zero, N, K, aligned_16(weight) && K * element % 16 == 0};
  const Activations a{x, stride_x, y, M, dtype};
  const Parameter b{bias, bias_dtype};
  const bool gelu_tanh = activation != 0;
  switch (which) {
    case WeightFormat::F32: return launch_steps<FloatSteps<float>>(a, w, b, gelu_tanh, stream);
    case WeightFormat::BF16:
      return launch_steps<FloatSteps<__nv_bfloat16>>(a, w, b, gelu_tanh, stream);
    case WeightFormat::F16: return launch_steps<FloatSteps<__half>>(a, w, b, gelu_tanh, stream);
    case WeightFormat::INT8: return launch_steps<Int8Steps>(a, w, b, gelu_tanh, stream);
    case WeightFormat::INT4: return launch_steps<Int4Steps>(a, w, b, gelu_tanh, stream);
  }
}

}  // namespace gptfast::cuda
