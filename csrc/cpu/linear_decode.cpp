// y = act(x W^T + b) for a few rows of x: M rows of K values, N output channels. See linear_decode.h.
#include "linear_decode.h"

// Rows of x are stride_x elements apart; y is contiguous. scale and zero belong to quantised weights;
// zero and bias may be null.
DECLARE_KERNEL(linear_decode_fwd,
               void(const void* x, int64_t stride_x, const void* weight, const void* scale,
                    const void* zero, const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                    int format, int activation, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

// Of 16 rows each: W is read once for all of them. Their bytes fit into the second-level cache.
constexpr int64_t kBlocks = 4;
constexpr int64_t kBytesPerThread = 64 * 1024;  // some 3 us of reading, the price of a fork

template <class T>
void forward(const T* x, int64_t stride_x, const Weight& w, const float* bias, T* y, int64_t M,
             Activation activation) {
  static thread_local Scratch scratch;
  const int64_t floats = RowsOfX::floats(w.K), blocks = (M + kRows - 1) / kRows;
  float* buffer = scratch.reserve(floats * std::min(blocks, kBlocks));
  const int64_t grain = kBytesPerThread / std::max<int64_t>(w.panel_bytes(), 1) + 1;
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t count = std::min(kBlocks, blocks - first);
    auto rows_of = [&](int64_t block) {
      const int64_t left = M - (first + block) * kRows;
      return RowsOfX(buffer + block * floats, std::min<int64_t>(left, kRows), w.K);
    };
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const RowsOfX rows = rows_of(block);
        for (int64_t m = 0; m < rows.M; ++m) {
          const T* from = x + ((first + block) * kRows + m) * stride_x;
          float* to = rows.x + m * rows.stride();
          for_each_vector(w.K,
                          [&](int64_t k, auto part) { part.store(to + k, part.load(from + k)); });
          prepare_row(w, rows, m);
        }
      }
    });
    parallel_for(w.panels(), grain, [&](int64_t begin, int64_t end) {
      alignas(64) PanelSums sums;
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t block = 0; block < count; ++block) {
          const RowsOfX rows = rows_of(block);
          panel_product(w, panel, rows, sums);
          T* to = y + (first + block) * kRows * w.N + panel * kPanel;
          for (int64_t m = 0; m < rows.M; ++m)
            for_each_vector(w.channels(panel), [&](int64_t c, auto part) {
              f32v z = load(sums[m] + c);
              if (bias) z += part.load(bias + panel * kPanel + c);
              part.store(to + m * w.N + c, activate(z, activation));
            });
        }
    });
  }
}

void linear_decode_fwd(const void* x, int64_t stride_x, const void* weight, const void* scale,
                       const void* zero, const float* bias, void* y, int64_t M, int64_t N,
                       int64_t K, int format, int activation, DType dtype) {
  const Weight w{weight, scale, static_cast<const uint8_t*>(zero),
                 N,      K,     static_cast<WeightFormat>(format)};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(x), stride_x, w, bias, static_cast<T*>(y), M,
            static_cast<Activation>(activation));
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(linear_decode_fwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_linear_decode(pybind11::module_& m) {
  gptfast::bind_kernel(m, "linear_decode_fwd", gptfast::kernel_linear_decode_fwd);
}
#endif
