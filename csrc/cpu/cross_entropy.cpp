// Cross-entropy of each row of logits x (M rows, V columns) with its target class t,
// and its gradient.
//
//   lse = log sum_c exp(x_c)
//   loss = (1 - s) w_t (lse - x_t) + (s / V) sum_c w_c (lse - x_c)      s: label smoothing
//   dx_c = g [ a exp(x_c - lse) - (1 - s) w_t [c = t] - (s / V) w_c ]    g: the row's gradient
//          a = (1 - s) w_t + (s / V) sum_c w_c
//
// w are the class weights, 1 where none are given. A row whose target is `ignore_index` has loss 0
// and gradient 0. Forward reads the logits once from memory: a running maximum and sum are updated
// chunk by chunk, each chunk small enough to stay in the first-level cache. Backward reads and
// writes once.
#include <cfloat>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

// target: (M,) class indices. weight: (V,) or null. loss, lse: (M,). Returns the first row whose
// target is neither in [0, V) nor ignore_index (nothing is computed then), or -1.
DECLARE_KERNEL(cross_entropy_fwd, int64_t(const void* x, const int64_t* target, const float* weight,
                                          float* loss, float* lse, int64_t M, int64_t V,
                                          int64_t ignore_index, float smoothing, DType dtype))
DECLARE_KERNEL(cross_entropy_bwd,
               void(const float* dloss, const void* x, const int64_t* target, const float* weight,
                    const float* lse, void* dx, int64_t M, int64_t V, int64_t ignore_index,
                    float smoothing, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // logits: 16 KiB of fp32, a third of a first-level cache
constexpr int64_t kGrainElements = 8192;

inline int64_t rows_per_thread(int64_t V) { return kGrainElements / (V + 1) + 1; }

inline float sum(const float* w, int64_t V) {
  f32v total{};
  for_each_vector(V, [&](int64_t c, auto part) { total += part.load(w + c); });
  return reduce_add(total);
}

template <class T>
float log_sum_exp(const T* x, int64_t V) {
  float running_max = -FLT_MAX, running_sum = 0;
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = V - begin < kChunk ? V - begin : kChunk;
    f32v top = set1(running_max);
    for_each_vector(n, [&](int64_t c, auto part) {
      top = max(part.live(part.load(x + begin + c), set1(-FLT_MAX)), top);
    });
    const float new_max = reduce_max(top);
    f32v total{};
    for_each_vector(n, [&](int64_t c, auto part) {
      total += part.live(exp(part.load(x + begin + c) - new_max), f32v{});
    });
    running_sum = running_sum * std::exp(running_max - new_max) + reduce_add(total);
    running_max = new_max;
  }
  return running_max + std::log(running_sum);
}

template <class T>
float smoothing_loss(const T* x, const float* weight, float lse,
                     int64_t V) {  // sum_c w_c (lse - x_c)
  f32v total{};
  for_each_vector(V, [&](int64_t c, auto part) {
    f32v term = lse - part.load(x + c);
    if (weight) term *= part.load(weight + c);
    total += part.live(term, f32v{});
  });
  return reduce_add(total);
}

template <class T>
void forward(const T* x, const int64_t* target, const float* weight, float* loss, float* lse,
             int64_t M, int64_t V, int64_t ignore_index, float smoothing) {
  parallel_for(M, rows_per_thread(V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      if (t == ignore_index) {
        loss[i] = lse[i] = 0;
        continue;
      }
      const T* row = x + i * V;
      lse[i] = log_sum_exp(row, V);
      const float w = weight ? weight[t] : 1.0f;
      const float logit = load_n(row + t, 1)[0];
      loss[i] = (1 - smoothing) * w * (lse[i] - logit);
      if (smoothing != 0) loss[i] += smoothing / V * smoothing_loss(row, weight, lse[i], V);
    }
  });
}

template <class T>
void backward(const float* dloss, const T* x, const int64_t* target, const float* weight,
              const float* lse, T* dx, int64_t M, int64_t V, int64_t ignore_index,
              float smoothing) {
  const float smooth = smoothing / V;
  const float weight_sum = weight && smoothing != 0 ? sum(weight, V) : V;
  parallel_for(M, rows_per_thread(V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      const T* row = x + i * V;
      T* out = dx + i * V;
      if (t == ignore_index) {
        std::memset(out, 0, V * sizeof(T));
        continue;
      }
      const float g = dloss[i];
      const float hit = (1 - smoothing) * (weight ? weight[t] : 1.0f);
      const float scale = g * (hit + smooth * weight_sum);
      for_each_vector(V, [&](int64_t c, auto part) {
        f32v grad = scale * exp(part.load(row + c) - lse[i]);
        if (smooth != 0) grad -= g * smooth * (weight ? part.load(weight + c) : set1(1.0f));
        part.store(out + c, grad);
      });
      // The target's entry once more, in fp32 before it is rounded to the storage type.
      float grad = scale * exp(load_n(row + t, 1) - lse[i])[0] - g * hit;
      if (smooth != 0) grad -= g * smooth * (weight ? weight[t] : 1.0f);
      store_n(out + t, set1(grad), 1);
    }
  });
}

int64_t cross_entropy_fwd(const void* x, const int64_t* target, const float* weight, float* loss,
                          float* lse, int64_t M, int64_t V, int64_t ignore_index, float smoothing,
                          DType dtype) {
  for (int64_t i = 0; i < M; ++i)
    if (target[i] != ignore_index && (target[i] < 0 || target[i] >= V)) return i;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(x), target, weight, loss, lse, M, V, ignore_index, smoothing);
  });
  return -1;
}

void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target,
                       const float* weight, const float* lse, void* dx, int64_t M, int64_t V,
                       int64_t ignore_index, float smoothing, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    backward(dloss, static_cast<const T*>(x), target, weight, lse, static_cast<T*>(dx), M, V,
             ignore_index, smoothing);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(cross_entropy_fwd)
REGISTER_KERNEL(cross_entropy_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_cross_entropy(pybind11::module_& m) {
  gptfast::bind_kernel(m, "cross_entropy_fwd", gptfast::kernel_cross_entropy_fwd);
  gptfast::bind_kernel(m, "cross_entropy_bwd", gptfast::kernel_cross_entropy_bwd);
}
#endif
