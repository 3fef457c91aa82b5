// y = gelu(h + b), h = x w^T, bf16, on the tile unit (AMX). The maths stands in
// gptfast/ops/linear_gelu.py, GELU's in gelu.cpp. Other instruction sets and dtypes: PyTorch's
// products and bias_gelu, in Python.
//
// x and w are cut into panels of 32 tokens, outputs or channels. For each block of outputs, whose
// weights are packed once and stay in the second-level cache, and every token panel: h = x w^T, and
// while the next 32 x 32 numbers of it are made, h and gelu(h + b) are written. Neither is read again.
// Sums are fp32. Threads share out token panels: every number is computed by one thread.
//
// Backward calls the library's products: a loop like this one for dx and dw was no faster.
#include "gelu_forms.h"
#include "isa.h"
#include "stream.h"
#include "tile_units.h"

// x: (M, C), w: (N, C), b: (N,) fp32, all of them contiguous; y, h: (M, N), h may be null.
// workspace: as many bytes as the same call with a null workspace returns; it does nothing else.
DECLARE_KERNEL(linear_gelu_fwd,
               int64_t(const void* x, const void* w, const float* b, void* y, void* h, int64_t M,
                       int64_t N, int64_t C, bool tanh_form, void* workspace))

#ifdef __AMX_BF16__
namespace gptfast::GPTFAST_ISA {
namespace {

// Of a block of outputs: 1.2 MB of w where C is 768, in a second-level cache of 2 MB.
constexpr int64_t kBlockPanels = 24;

struct Call {
  const bf16 *x, *w;
  const float* b;
  int64_t M, N, C;

  int64_t token_panels() const { return panels_of(M); }
  int64_t output_panels() const { return panels_of(N); }
  int64_t channel_panels() const { return panels_of(C); }
  int64_t block_panels() const { return smaller(kBlockPanels, output_panels()); }
  int64_t panels_from(int64_t first) const {
    return smaller(kBlockPanels, output_panels() - first);
  }
  int threads() const {
    constexpr double kForkProducts = 250'000;  // some microseconds' worth
    if (omp_in_parallel() || static_cast<double>(M) * N * C < kForkProducts) return 1;
    return omp_get_max_threads();
  }
};

// 32 numbers of b, zeros behind the last one.
inline void read_bias(const Call& call, int64_t first, f32v (&b)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int64_t at = first + half * W, n = larger(0, smaller(W, call.N - at));
    b[half] = n ? load_n(call.b + at, n) : f32v{};
  }
}

// Writes 32 tokens x 32 outputs of h, and of y.
template <class Form, class Stores>
class ActivationWork {
 public:
  ActivationWork(const Call& call, bf16* y, bf16* h, Stores stores)
      : call_(call), y_(y), h_(h), stores_(stores) {}

  void begin(const float* block, int64_t token, int64_t output) {
    block_ = block;
    rows_ = call_.M - token;
    columns_ = smaller(kPanel, call_.N - output);
    at_ = token * call_.N + output;
    read_bias(call_, output, b_);
    steps = 16;
  }
  void step() {
    const int64_t first = (16 - steps) * 2;
    --steps;
    for (int64_t r = first; r < smaller(first + 2, rows_); ++r)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = at_ + r * call_.N + half * W, n = columns_ - half * W;
        const f32v h = load(block_ + r * kPanel + half * W);
        if (n >= W)
          put(Whole{}, at, h, half);
        else if (n > 0)
          put(Tail{n}, at, h, half);
      }
  }
  int steps = 0;

 private:
  template <class Part>
  void put(Part part, int64_t at, f32v h, int half) {
    if (h_) stores_.store(part, h_ + at, h);
    stores_.store(part, y_ + at, Form::value(h + b_[half]));
  }

  const Call& call_;
  bf16 *y_, *h_;
  Stores stores_;
  const float* block_ = nullptr;
  int64_t rows_ = 0, columns_ = 0, at_ = 0;
  f32v b_[2];
};

struct ForwardBuffers {
  bf16 *x, *w[2];
  int64_t bytes;

  ForwardBuffers(const Call& call, void* workspace) {
    Arena arena(workspace);
    const int64_t channels = call.channel_panels();
    x = arena.take<bf16>(call.token_panels() * channels * kUnit);
    for (auto& block : w) block = arena.take<bf16>(call.block_panels() * channels * kUnit);
    bytes = arena.bytes();
  }
};

template <class Form, class Stores>
void forward(const Call& call, const ForwardBuffers& buffers, bf16* y, bf16* h, Stores stores) {
  const int64_t channels = call.channel_panels();
  auto pack_w = [&](int64_t first) {  // this thread's share of a block
    Unit block;
    const Share share(call.panels_from(first));
    bf16* to = buffers.w[first / kBlockPanels % 2] + share.begin * channels * kUnit;
    for (int64_t p = first + share.begin; p < first + share.end; ++p)
      for (int64_t c = 0; c < channels; ++c, to += kUnit) {
        read_block(call.w + p * kPanel * call.C + c * kPanel, call.C, call.N - p * kPanel,
                   call.C - c * kPanel, block);
        pack_b_from_rows(block, to);
      }
  };
#pragma omp parallel num_threads(call.threads())
  {
    const amx::Tiles tiles;
    const Share mine(call.token_panels());
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int64_t c = 0; c < channels; ++c) {
        Unit* to = reinterpret_cast<Unit*>(buffers.x + (p * channels + c) * kUnit);
        read_block(call.x + p * kPanel * call.C + c * kPanel, call.C, call.M - p * kPanel,
                   call.C - c * kPanel, *to);
      }
    pack_w(0);
#pragma omp barrier
    InTurns turns;
    ReadAhead ahead;
    ActivationWork<Form, Stores> work(call, y, h, stores);
    for (int64_t first = 0; first < call.output_panels(); first += kBlockPanels) {
      const int64_t panels = call.panels_from(first);
      const bf16* w = buffers.w[first / kBlockPanels % 2];
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        const bf16* x = buffers.x + p * channels * kUnit;
        ahead.begin(buffers.x + mine.after(p) * channels * kUnit, channels * kUnit * 2,
                    panels * channels);
        for (int64_t n = 0; n < panels; ++n) {
          float* block = turns.next();
          multiply(x, w + n * channels * kUnit, channels, block, false, n % 2, work, ahead);
          work.begin(block, p * kPanel, (first + n) * kPanel);
        }
      }
      if (first + kBlockPanels < call.output_panels()) pack_w(first + kBlockPanels);
#pragma omp barrier
    }
    drain(work);
    finish_stores();
  }
}

int64_t linear_gelu_fwd(const void* x, const void* w, const float* b, void* y, void* h, int64_t M,
                        int64_t N, int64_t C, bool tanh_form, void* workspace) {
  const Call call{static_cast<const bf16*>(x), static_cast<const bf16*>(w), b, M, N, C};
  const ForwardBuffers buffers(call, workspace);
  if (!workspace) return buffers.bytes;
  const int64_t bytes = M * N * static_cast<int64_t>(sizeof(bf16));
  if (h && bytes >= kStreamBytes) is_fresh(h, bytes);  // asks for huge pages if so
  with_gelu_form(tanh_form, [&](auto form) {
    with_stores(static_cast<const bf16*>(y), M, N, [&](auto stores) {
      forward<decltype(form)>(call, buffers, static_cast<bf16*>(y), static_cast<bf16*>(h), stores);
    });
  });
  return buffers.bytes;
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(linear_gelu_fwd)
#endif

#ifdef GPTFAST_BASELINE
namespace gptfast {  // other levels have no entry: Python does not ask them
KernelTable<signature_linear_gelu_fwd> kernel_linear_gelu_fwd;
}  // namespace gptfast

#include "../common/bind.h"
void register_linear_gelu(pybind11::module_& m) {
  gptfast::bind_kernel(m, "linear_gelu_fwd", gptfast::kernel_linear_gelu_fwd);
}
#endif
