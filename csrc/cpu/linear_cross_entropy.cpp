// Cross-entropy of the logits z = x w^T + b, bf16, on the tile unit (AMX); nothing of size M V is
// ever stored. The maths stands in gptfast/ops/linear_cross_entropy.py, that of the loss in
// cross_entropy.cpp. Other instruction sets and dtypes: chunks of rows, in Python. One file of more
// than 500 lines, since packing, products and what becomes of them share one layout of units.
//
// x and w are cut into panels of 32 tokens, classes or channels. For each vocabulary block of 12
// panels, whose weights are packed once and stay in the second-level cache:
//
//   forward    every token panel:  z^T = w x^T, and an online log-sum-exp over it
//   backward   every token panel:  z^T once more, dz^T from it, and dx^T += w^T dz^T
//              every class panel:  dw = dz^T x, over all tokens
//
// With z^T the classes are rows and the tokens lanes of a vector, so that nothing is ever reduced
// across lanes. Sums are fp32; dz is rounded to bf16 once. Threads share out token panels, then
// blocks of dw: every number is computed by one thread, in an order that does not depend on how
// many there are.
//
// The product of 32 x 32 numbers is bound by the second-level cache (64 bytes for each of 16 cycles
// of the tile unit), so two things are done about it. Every other product runs through K backwards:
// what the last one left in the first-level cache is met first. And the vector unit, idle meanwhile,
// does the exponentials of the block before: a step of `work` for each step of K.
#include <cfloat>
#include <initializer_list>
#include <type_traits>

#include "isa.h"
#include "softcap.h"
#include "tile_units.h"

// x: (M, C), w: (V, C), b: (V,) fp32 or null, target: (M,), class_weight: (V,) or null, all of them
// contiguous; loss, lse: (M,). softcap: 0 for none. workspace: as many bytes as the same call with
// a null workspace returns; it does nothing else.
DECLARE_KERNEL(linear_cross_entropy_fwd,
               int64_t(const void* x, const void* w, const float* b, const int64_t* target,
                       const float* class_weight, float* loss, float* lse, int64_t M, int64_t V,
                       int64_t C, int64_t ignore_index, float smoothing, float z_loss,
                       float softcap, void* workspace))
// dx: (M, C) and dw: (V, C) bf16, db: (V,) fp32; null for what nobody asked for.
DECLARE_KERNEL(linear_cross_entropy_bwd,
               int64_t(const float* dloss, const void* x, const void* w, const float* b,
                       const int64_t* target, const float* class_weight, const float* lse, void* dx,
                       void* dw, float* db, int64_t M, int64_t V, int64_t C, int64_t ignore_index,
                       float smoothing, float z_loss, float softcap, void* workspace))

#ifdef __AMX_BF16__
namespace gptfast::GPTFAST_ISA {
namespace {

// Of a vocabulary block: w in its two forms is 1.2 MB where C is 768, and stays in a second-level
// cache of 2 MB beside what streams past. Of 8, 12, 16 and 24, 12 had the fastest backward.
constexpr int64_t kBlockPanels = 12;

// ---- A call --------------------------------------------------------------------------------------

struct Call {
  const bf16 *x, *w;
  const float* b;
  const int64_t* target;
  const float* class_weight;
  int64_t M, V, C, ignore_index;
  float smoothing, z_loss, softcap;

  int64_t token_panels() const { return panels_of(M); }
  int64_t class_panels() const { return panels_of(V); }
  int64_t channel_panels() const { return panels_of(C); }
  int64_t block_panels() const { return smaller(kBlockPanels, class_panels()); }
  int64_t token_chunks() const { return (token_panels() + kTokenPanels - 1) / kTokenPanels; }
  float weight_of(int64_t c) const { return class_weight ? class_weight[c] : 1.0f; }
  float bias_of(int64_t c) const { return b ? b[c] : 0.0f; }
  float weight_sum() const {
    double total = 0;
    for (int64_t c = 0; c < V && class_weight; ++c) total += class_weight[c];
    return class_weight ? static_cast<float>(total) : static_cast<float>(V);
  }
  int threads() const {
    constexpr double kForkProducts = 250'000;  // some microseconds' worth
    if (omp_in_parallel() || static_cast<double>(M) * V * C < kForkProducts) return 1;
    return omp_get_max_threads();
  }
};

// x as operand B: units[token panel][channel panel] with channels along K, and, where dw is wanted,
// with tokens along K.
void pack_x(const Call& call, int64_t token_panel, bf16* with_channels, bf16* with_tokens) {
  Unit block;
  const int64_t token = token_panel * kPanel, panels = call.channel_panels();
  for (int64_t p = 0; p < panels; ++p) {
    read_block(call.x + token * call.C + p * kPanel, call.C, call.M - token, call.C - p * kPanel,
               block);
    if (with_channels) pack_b_from_rows(block, with_channels + (token_panel * panels + p) * kUnit);
    if (with_tokens) pack_b_from_columns(block, with_tokens + token_unit(p, panels, token_panel));
  }
}

// A class panel of w as operand A: units[panel in block][channel panel] with channels along K, and,
// where dx is wanted, units[channel panel][panel in block] with classes along K.
void pack_w(const Call& call, int64_t class_panel, bf16* with_channels, bf16* with_classes) {
  Unit block;
  const int64_t panels = call.channel_panels(), first = class_panel * kPanel;
  const int64_t in_block = class_panel % kBlockPanels;
  for (int64_t p = 0; p < panels; ++p) {
    read_block(call.w + first * call.C + p * kPanel, call.C, call.V - first, call.C - p * kPanel,
               block);
    std::memcpy(with_channels + (in_block * panels + p) * kUnit, &block, sizeof block);
    if (with_classes)
      pack_a_from_columns(block, with_classes + (p * call.block_panels() + in_block) * kUnit);
  }
}

// The target of each token, -1 where it is ignored and behind the last token.
int32_t target_of(const Call& call, int64_t token) {
  if (token >= call.M || call.target[token] == call.ignore_index) return -1;
  return static_cast<int32_t>(call.target[token]);
}

// ---- What becomes of a block of logits -----------------------------------------------------------
// z holds 32 classes from `first` on x 32 tokens. GENERAL: there is a bias, a softcap or smoothing.

// What is known of the tokens so far. `top` is no less than the largest logit less kSlack.
struct ForwardState {
  float *top, *sum, *at_target, *weighted;  // sum_c exp(z_c - top), z_t, sum_c w_c z_c
  const int32_t* target;
};

template <class Cap, bool GENERAL>
class ForwardWork {
 public:
  ForwardWork(const Call& call, const ForwardState& state, Cap cap)
      : call_(call), state_(state), cap_(cap) {}

  // Everything but the exponentials.
  void begin(float* z, int64_t first, int64_t token) {
    z_ = z;
    token_ = token;
    const int64_t classes = smaller(kPanel, call_.V - first);
    if constexpr (GENERAL) transform(first, classes);
    for (int64_t r = classes; r < kPanel; ++r)
      for (int h = 0; h < 2; ++h) store(z + r * kPanel + h * W, set1(-INFINITY));
    for (int h = 0; h < 2; ++h) {
      float* top_at = state_.top + token + h * W;
      f32v top = load(top_at), old = top;
      for (int64_t r = 0; r < kPanel; ++r) top = max(top, load(z + r * kPanel + h * W));
      sum_[h] = load(state_.sum + token + h * W);
      if (_mm512_cmp_ps_mask(top, old + kSlack, _CMP_GT_OQ)) {
        sum_[h] *= exp2((old - top) * kLog2E);
        store(top_at, top);
      } else {
        top = old;
      }
      scaled_top_[h] = top * kLog2E;
      find_targets(first, classes, h);
    }
    steps = 16;
  }

  void step() {
    const float* row = z_ + (16 - steps) * 2 * kPanel;
    for (int h = 0; h < 2; ++h) {
      const f32v even = load(row + h * W), odd = load(row + kPanel + h * W);
      sum_[h] += exp2(even * kLog2E - scaled_top_[h]) + exp2(odd * kLog2E - scaled_top_[h]);
    }
    if (--steps == 0)
      for (int h = 0; h < 2; ++h) store(state_.sum + token_ + h * W, sum_[h]);
  }

  int steps = 0;

 private:
  // exp(8) times a sum of 2^31 terms is no danger to a float, and a `top` that may lag behind that
  // far is almost never moved.
  static constexpr float kSlack = 8.0f;

  void transform(int64_t first, int64_t classes) {
    for (int h = 0; h < 2; ++h) {
      f32v weighted = load(state_.weighted + token_ + h * W);
      for (int64_t r = 0; r < classes; ++r) {
        float* at = z_ + r * kPanel + h * W;
        const f32v z = cap_(load(at) + call_.bias_of(first + r));
        store(at, z);
        weighted += call_.weight_of(first + r) * z;
      }
      store(state_.weighted + token_ + h * W, weighted);
    }
  }

  void find_targets(int64_t first, int64_t classes, int h) {
    const __m512i row = _mm512_sub_epi32(_mm512_loadu_si512(state_.target + token_ + h * W),
                                         _mm512_set1_epi32(static_cast<int>(first)));
    // as unsigned numbers, so that those below 0 are too large
    const __mmask16 here =
        _mm512_cmplt_epu32_mask(row, _mm512_set1_epi32(static_cast<int>(classes)));
    if (!here) return;
    const __m512i at =
        _mm512_add_epi32(_mm512_slli_epi32(row, 5), bit_cast<__m512i>(lane_index() + h * W));
    float* to = state_.at_target + token_ + h * W;
    _mm512_storeu_ps(to, _mm512_mask_i32gather_ps(load(to), here, at, z_, 4));
  }

  const Call& call_;
  const ForwardState& state_;
  Cap cap_;
  float* z_ = nullptr;
  int64_t token_ = 0;
  f32v sum_[2], scaled_top_[2];
};

// dz_c = scale exp(z_c - lse) - hit [c = t] - smooth w_c, of a token
struct BackwardState {
  float *lse, *scale, *hit, *smooth;
  const int32_t* target;
};

template <class Cap, bool GENERAL>
class BackwardWork {
 public:
  // a: operand A with tokens along K, or null. b: operand B with classes along K, of one token
  // panel: units[panel in block], or null.
  BackwardWork(const Call& call, const BackwardState& state, Cap cap, bf16* a, bf16* b)
      : call_(call), state_(state), cap_(cap), a_(a), b_(b) {}

  void begin(float* z, int64_t first, int64_t token) {
    z_ = z;
    first_ = first;
    token_ = token;
    const int64_t in_block = first / kPanel % kBlockPanels;
    a_unit_ = a_ ? a_ + token_unit(in_block, call_.block_panels(), token / kPanel) : nullptr;
    b_unit_ = b_ ? b_ + in_block * kUnit : nullptr;
    for (int h = 0; h < 2; ++h) {
      scale_[h] = load(state_.scale + token + h * W);
      smooth_[h] = load(state_.smooth + token + h * W);
      scaled_lse_[h] = load(state_.lse + token + h * W) * kLog2E;
      counted_[h] =
          _mm512_cmpge_epi32_mask(_mm512_loadu_si512(state_.target + token + h * W), __m512i{});
    }
    steps = 16;
  }

  void step() {
    const int64_t r = (16 - steps) * 2;
    // The next block's place: the last user of it was another thread, or long ago.
    if (a_unit_)
      for (int64_t i = r; i < r + 2; ++i)
        __builtin_prefetch(a_unit_ + kTokenPanels * kUnit + i * kPanel, 1);
    f32v d[2][2];
    for (int i = 0; i < 2; ++i)
      for (int h = 0; h < 2; ++h) d[i][h] = gradient(r + i, h);
    const auto rows = [](f32v low, f32v high) {
      return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    };
    const __m512i even = rows(d[0][0], d[0][1]), odd = rows(d[1][0], d[1][1]);
    if (a_unit_) {
      _mm512_store_si512(a_unit_ + r * kPanel, even);
      _mm512_store_si512(a_unit_ + (r + 1) * kPanel, odd);
    }
    if (b_unit_) {
      bf16* pair = b_unit_ + r / 2 * kPanel;
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, left_, odd));
      _mm512_store_si512(pair + kUnit / 2, _mm512_permutex2var_epi16(even, right_, odd));
    }
    if (--steps == 0) finish();
  }

  int steps = 0;

 private:
  // Without the target's own term; 0 for tokens that do not count, whatever the others are.
  f32v gradient(int64_t r, int h) const {
    f32v z = load(z_ + r * kPanel + h * W);
    if constexpr (!GENERAL)
      return _mm512_maskz_mul_ps(counted_[h], scale_[h], exp2(z * kLog2E - scaled_lse_[h]));
    const int64_t c = smaller(first_ + r, call_.V - 1);
    z += call_.bias_of(c);
    f32v d = scale_[h] * exp2(cap_(z) * kLog2E - scaled_lse_[h]);
    d -= smooth_[h] * call_.weight_of(c);
    return _mm512_maskz_mul_ps(counted_[h], d, cap_.slope(z));
  }

  // Targets, with their own term before anything is rounded; zeros behind the last class.
  void finish() {
    for (int64_t r = call_.V - first_; r < kPanel; ++r)
      for (int64_t token = 0; token < kPanel; ++token) put(r, token, 0.0f);
    for (int h = 0; h < 2; ++h) {
      const __m512i row = _mm512_sub_epi32(_mm512_loadu_si512(state_.target + token_ + h * W),
                                           _mm512_set1_epi32(static_cast<int>(first_)));
      unsigned here = _mm512_cmplt_epu32_mask(row, _mm512_set1_epi32(kPanel));
      for (; here; here &= here - 1) {
        const int lane = __builtin_ctz(here);
        const int64_t r = state_.target[token_ + h * W + lane] - first_;
        const float z = z_[r * kPanel + h * W + lane];
        const f32v slope = cap_.slope(set1(z + (GENERAL ? call_.bias_of(first_ + r) : 0.0f)));
        const f32v d = gradient(r, h);
        put(r, h * W + lane, d[lane] - state_.hit[token_ + h * W + lane] * slope[0]);
      }
    }
  }

  void put(int64_t r, int64_t token, float value) {
    bf16 rounded;
    rounded.bits = to_bits(set1(value), bf16{})[0];
    if (a_unit_) a_unit_[r * kPanel + token] = rounded;
    if (b_unit_)
      b_unit_[token / 16 * (kUnit / 2) + r / 2 * kPanel + token % 16 * 2 + r % 2] = rounded;
  }

  const Call& call_;
  const BackwardState& state_;
  Cap cap_;
  bf16 *a_, *b_, *a_unit_ = nullptr, *b_unit_ = nullptr;
  float* z_ = nullptr;
  int64_t first_ = 0, token_ = 0;
  f32v scale_[2], smooth_[2], scaled_lse_[2];
  __mmask16 counted_[2];
  const __m512i left_ = zip_indices(0), right_ = zip_indices(16);
};

// The logits of a vocabulary block and one token panel, each block of them handed to `work`, which
// is left with the last one.
template <class Work>
void logits(const Call& call, int64_t first_panel, int64_t token_panel, int64_t next_token_panel,
            const bf16* w, const bf16* x, InTurns& z, Work& work) {
  const int64_t channels = call.channel_panels();
  const int64_t panels = smaller(kBlockPanels, call.class_panels() - first_panel);
  ReadAhead ahead;
  ahead.begin(x + next_token_panel * channels * kUnit, channels * kUnit * 2, panels * channels + 1);
  for (int64_t p = 0; p < panels; ++p) {
    float* block = z.next();
    multiply(w + p * channels * kUnit, x + token_panel * channels * kUnit, channels, block, false,
             p % 2, work, ahead);
    work.begin(block, (first_panel + p) * kPanel, token_panel * kPanel);
  }
}

// ---- Forward -------------------------------------------------------------------------------------

struct ForwardBuffers {
  bf16 *x, *w[2];
  ForwardState state;
  int32_t* target;
  int64_t bytes;

  ForwardBuffers(const Call& call, void* workspace) {
    Arena arena(workspace);
    const int64_t tokens = call.token_panels() * kPanel, channels = call.channel_panels();
    x = arena.take<bf16>(call.token_panels() * channels * kUnit);
    for (auto& block : w) block = arena.take<bf16>(call.block_panels() * channels * kUnit);
    for (auto* numbers : {&state.top, &state.sum, &state.at_target, &state.weighted})
      *numbers = arena.take<float>(tokens);
    state.target = target = arena.take<int32_t>(tokens);
    bytes = arena.bytes();
  }
};

template <class Cap, bool GENERAL>
void forward(const Call& call, Cap cap, const ForwardBuffers& buffers, float* loss, float* lse) {
  const ForwardState& state = buffers.state;
  const float weight_sum = call.smoothing != 0 ? call.weight_sum() : 0.0f;
  auto pack_block = [&](int64_t first) {  // this thread's share of it
    const Share share(smaller(kBlockPanels, call.class_panels() - first));
    for (int64_t p = share.begin; p < share.end; ++p)
      pack_w(call, first + p, buffers.w[first / kBlockPanels % 2], nullptr);
  };
#pragma omp parallel num_threads(call.threads())
  {
    const amx::Tiles tiles;
    const Share mine(call.token_panels());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      pack_x(call, p, buffers.x, nullptr);
      for (int64_t i = p * kPanel; i < (p + 1) * kPanel; ++i) {
        state.top[i] = -FLT_MAX / 2;  // so that it can be multiplied by log2(e)
        state.sum[i] = state.at_target[i] = state.weighted[i] = 0;
        buffers.target[i] = target_of(call, i);
      }
    }
    pack_block(0);
#pragma omp barrier
    InTurns z;
    ForwardWork<Cap, GENERAL> work(call, state, cap);
    for (int64_t first = 0; first < call.class_panels(); first += kBlockPanels) {
      for (int64_t p = mine.begin; p < mine.end; ++p)
        logits(call, first, p, mine.after(p), buffers.w[first / kBlockPanels % 2], buffers.x, z,
               work);
      if (first + kBlockPanels < call.class_panels()) pack_block(first + kBlockPanels);
#pragma omp barrier
    }
    drain(work);
    for (int64_t i = mine.begin * kPanel; i < smaller(mine.end * kPanel, call.M); ++i) {
      loss[i] = lse[i] = 0;
      const int32_t t = state.target[i];
      if (t < 0) continue;
      lse[i] = state.top[i] + std::log(state.sum[i]);
      loss[i] = (1 - call.smoothing) * call.weight_of(t) * (lse[i] - state.at_target[i]);
      if (call.smoothing != 0)
        loss[i] += call.smoothing / call.V * (weight_sum * lse[i] - state.weighted[i]);
      if (call.z_loss != 0) loss[i] += call.z_loss * lse[i] * lse[i];
    }
  }
}

// ---- Backward ------------------------------------------------------------------------------------

struct BackwardBuffers {
  bf16 *x_channels, *x_tokens = nullptr;             // x as operand of z and of dw
  bf16 *w_channels, *w_classes = nullptr;            // w as operand of z and of dx
  bf16 *dz_tokens = nullptr, *dz_classes = nullptr;  // dz as operand of dw and, per thread, of dx
  float *dx = nullptr,
        *dw = nullptr;  // blocks [token panel][channel panel], [class][channel panel]
  BackwardState state;
  int32_t* target;
  int64_t bytes;

  BackwardBuffers(const Call& call, bool needs_dx, bool needs_dw, bool needs_db, void* workspace) {
    Arena arena(workspace);
    const int64_t tokens = call.token_panels(), channels = call.channel_panels();
    const int64_t block = call.block_panels();
    x_channels = arena.take<bf16>(tokens * channels * kUnit);
    w_channels = arena.take<bf16>(block * channels * kUnit);
    const int64_t padded = call.token_chunks() * kTokenPanels;
    if (needs_dw) x_tokens = arena.take<bf16>(padded * channels * kUnit);
    if (needs_dw) dw = arena.take<float>(block * channels * kUnit);
    if (needs_dw || needs_db) dz_tokens = arena.take<bf16>(block * padded * kUnit);
    if (needs_dx) w_classes = arena.take<bf16>(block * channels * kUnit);
    if (needs_dx) dx = arena.take<float>(tokens * channels * kUnit);
    if (needs_dx) dz_classes = arena.take<bf16>(call.threads() * block * kUnit);
    for (auto* numbers : {&state.lse, &state.scale, &state.hit, &state.smooth})
      *numbers = arena.take<float>(tokens * kPanel);
    state.target = target = arena.take<int32_t>(tokens * kPanel);
    bytes = arena.bytes();
  }
};

// Meanwhile, rounds the block of dw before to where it belongs.
class RoundWork {
 public:
  RoundWork(const Call& call, bf16* dw) : call_(call), dw_(dw) {}
  void begin(const float* block, int64_t class_panel, int64_t channel_panel) {
    block_ = block;
    const int64_t columns = call_.C - channel_panel * kPanel;
    live_ = columns >= kPanel ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    rows_ = call_.V - class_panel * kPanel;
    row_ = dw_ + class_panel * kPanel * call_.C + channel_panel * kPanel;
    steps = 16;
  }
  void step() {
    for (int64_t r = (16 - steps) * 2, end = r + 2; r < end && r < rows_; ++r) {
      const float* from = block_ + r * kPanel;
      const __m512i rounded = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(load(from + W), load(from)));
      _mm512_mask_storeu_epi16(row_ + r * call_.C, live_, rounded);
    }
    --steps;
  }
  int steps = 0;

 private:
  const Call& call_;
  bf16 *dw_, *row_ = nullptr;
  const float* block_ = nullptr;
  int64_t rows_ = 0;
  __mmask32 live_ = 0;
};

void prepare_tokens(const Call& call, const BackwardBuffers& buffers, const float* dloss,
                    const float* lse, float weight_sum, int64_t token_panel) {
  const BackwardState& state = buffers.state;
  for (int64_t i = token_panel * kPanel; i < (token_panel + 1) * kPanel; ++i) {
    const int32_t t = buffers.target[i] = target_of(call, i);
    state.lse[i] = state.scale[i] = state.hit[i] = state.smooth[i] = 0;
    if (t < 0) continue;
    const float hit = (1 - call.smoothing) * call.weight_of(t), smooth = call.smoothing / call.V;
    state.lse[i] = lse[i];
    state.scale[i] = dloss[i] * (hit + smooth * weight_sum + 2 * call.z_loss * lse[i]);
    state.hit[i] = dloss[i] * hit;
    state.smooth[i] = dloss[i] * smooth;
  }
}

// dx^T += w^T dz^T of one token panel and a vocabulary block of so many panels.
void add_to_dx(const Call& call, const BackwardBuffers& buffers, const bf16* dz, int64_t panels,
               int64_t token_panel, bool first) {
  const int64_t channels = call.channel_panels();
  float* dx = buffers.dx + token_panel * channels * kUnit;
  NoWork none;
  ReadAhead ahead;
  for (int64_t c = 0; c < channels; ++c, dx += kUnit) {
    if (!first) ahead.begin(dx + kUnit, kUnit * 4, panels);
    multiply(buffers.w_classes + c * call.block_panels() * kUnit, dz, panels, dx, !first, c % 2,
             none, ahead);
  }
}

// dx in bf16 of one token panel, from its transpose.
void round_dx(const Call& call, const float* blocks, int64_t token_panel, bf16* dx) {
  alignas(64) float rows[kUnit];
  for (int64_t c = 0; c < call.C; c += kPanel, blocks += kUnit) {
    transpose(blocks, kPanel, kPanel, kPanel, rows, kPanel);
    for (int64_t r = 0; r < smaller(kPanel, call.M - token_panel * kPanel); ++r) {
      bf16* row = dx + (token_panel * kPanel + r) * call.C + c;
      for_each_vector(smaller(kPanel, call.C - c), [&](int64_t i, auto part) {
        part.store(row + i, load(rows + r * kPanel + i));
      });
    }
  }
}

// This thread's share of the blocks of dw = dz^T x of a vocabulary block.
void make_dw(const Call& call, const BackwardBuffers& buffers, int64_t first, int64_t panels,
             bf16* dw) {
  const int64_t channels = call.channel_panels(), tokens = call.token_panels();
  const Share share(panels * channels);
  RoundWork round(call, dw);
  NoWork none;
  ReadAhead ahead;
  for (int64_t t = 0; t < tokens; t += kTokenPanels) {
    const int64_t units = smaller(kTokenPanels, tokens - t);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int64_t panel = i / channels, channel = i % channels;
      const bf16* dz = buffers.dz_tokens + token_unit(panel, call.block_panels(), t);
      const bf16* x = buffers.x_tokens + token_unit(channel, channels, t);
      float* block = buffers.dw + i * kUnit;
      if (channel == 0 || i == share.begin) {
        ahead.begin(dz + kTokenPanels * kUnit, units * kUnit * 2, channels * units);
      }
      if (t + units < tokens) {
        multiply(dz, x, units, block, t > 0, channel % 2, none, ahead);
      } else {
        multiply(dz, x, units, block, t > 0, channel % 2, round, ahead);
        round.begin(block, first + panel, channel);
      }
    }
  }
  drain(round);
}

// This thread's share of db of a vocabulary block: the sums of dz over all tokens.
void make_db(const Call& call, const BackwardBuffers& buffers, int64_t first, int64_t panels,
             float* db) {
  const Share share(smaller(panels * kPanel, call.V - first * kPanel));
  const int64_t tokens = call.token_panels();
  for (int64_t r = share.begin; r < share.end; ++r) {
    f32v total{};
    for (int64_t t = 0; t < tokens; ++t) {
      const bf16* dz =
          buffers.dz_tokens + token_unit(r / kPanel, call.block_panels(), t) + r % kPanel * kPanel;
      total += load(dz) + load(dz + W);
    }
    db[first * kPanel + r] = reduce_add(total);
  }
}

template <class Cap, bool GENERAL>
void backward(const Call& call, Cap cap, const BackwardBuffers& buffers, const float* dloss,
              const float* lse, bf16* dx, bf16* dw, float* db) {
  const float weight_sum = call.smoothing != 0 ? call.weight_sum() : 0.0f;
  auto panels_from = [&](int64_t first) {
    return smaller(kBlockPanels, call.class_panels() - first);
  };
  auto pack_block = [&](int64_t first) {  // this thread's share of it
    const Share share(panels_from(first));
    for (int64_t p = share.begin; p < share.end; ++p)
      pack_w(call, first + p, buffers.w_channels, buffers.w_classes);
  };
#pragma omp parallel num_threads(call.threads())
  {
    const amx::Tiles tiles;
    const Share mine(call.token_panels());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      pack_x(call, p, buffers.x_channels, buffers.x_tokens);
      prepare_tokens(call, buffers, dloss, lse, weight_sum, p);
    }
    pack_block(0);
#pragma omp barrier
    InTurns z;
    bf16* dz =
        dx ? buffers.dz_classes + omp_get_thread_num() * call.block_panels() * kUnit : nullptr;
    BackwardWork<Cap, GENERAL> work(call, buffers.state, cap, buffers.dz_tokens, dz);
    for (int64_t first = 0; first < call.class_panels(); first += kBlockPanels) {
      const int64_t panels = panels_from(first);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        logits(call, first, p, mine.after(p), buffers.w_channels, buffers.x_channels, z, work);
        drain(work);
        if (dx) add_to_dx(call, buffers, dz, panels, p, first == 0);
      }
#pragma omp barrier
      if (dw) make_dw(call, buffers, first, panels, dw);
      if (db) make_db(call, buffers, first, panels, db);
      if (first + kBlockPanels < call.class_panels()) pack_block(first + kBlockPanels);
#pragma omp barrier
    }
    for (int64_t p = mine.begin; dx && p < mine.end; ++p)
      round_dx(call, buffers.dx + p * call.channel_panels() * kUnit, p, dx);
  }
}

template <class Body>  // calls body(cap, std::bool_constant<GENERAL>)
void with_options(const Call& call, const Body& body) {
  if (call.softcap != 0)
    body(Softcap{call.softcap}, std::true_type{});
  else if (call.b || call.smoothing != 0)
    body(Plain{}, std::true_type{});
  else
    body(Plain{}, std::false_type{});
}

int64_t linear_cross_entropy_fwd(const void* x, const void* w, const float* b,
                                 const int64_t* target, const float* class_weight, float* loss,
                                 float* lse, int64_t M, int64_t V, int64_t C, int64_t ignore_index,
                                 float smoothing, float z_loss, float softcap, void* workspace) {
  const Call call{static_cast<const bf16*>(x),
                  static_cast<const bf16*>(w),
                  b,
                  target,
                  class_weight,
                  M,
                  V,
                  C,
                  ignore_index,
                  smoothing,
                  z_loss,
                  softcap};
  const ForwardBuffers buffers(call, workspace);
  if (workspace)
    with_options(call, [&](auto cap, auto general) {
      forward<decltype(cap), decltype(general)::value>(call, cap, buffers, loss, lse);
    });
  return buffers.bytes;
}

int64_t linear_cross_entropy_bwd(const float* dloss, const void* x, const void* w, const float* b,
                                 const int64_t* target, const float* class_weight, const float* lse,
                                 void* dx, void* dw, float* db, int64_t M, int64_t V, int64_t C,
                                 int64_t ignore_index, float smoothing, float z_loss, float softcap,
                                 void* workspace) {
  const Call call{static_cast<const bf16*>(x),
                  static_cast<const bf16*>(w),
                  b,
                  target,
                  class_weight,
                  M,
                  V,
                  C,
                  ignore_index,
                  smoothing,
                  z_loss,
                  softcap};
  const BackwardBuffers buffers(call, dx, dw, db, workspace);
  if (workspace)
    with_options(call, [&](auto cap, auto general) {
      backward<decltype(cap), decltype(general)::value>(
          call, cap, buffers, dloss, lse, static_cast<bf16*>(dx), static_cast<bf16*>(dw), db);
    });
  return buffers.bytes;
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA
#endif

#ifdef __AMX_BF16__
REGISTER_KERNEL(linear_cross_entropy_fwd)
REGISTER_KERNEL(linear_cross_entropy_bwd)
#endif

#ifdef GPTFAST_BASELINE
namespace gptfast {  // other levels have no entry: Python does not ask them
KernelTable<signature_linear_cross_entropy_fwd> kernel_linear_cross_entropy_fwd;
KernelTable<signature_linear_cross_entropy_bwd> kernel_linear_cross_entropy_bwd;
}  // namespace gptfast

#include "../common/bind.h"
void register_linear_cross_entropy(pybind11::module_& m) {
  gptfast::bind_kernel(m, "linear_cross_entropy_fwd", gptfast::kernel_linear_cross_entropy_fwd);
  gptfast::bind_kernel(m, "linear_cross_entropy_bwd", gptfast::kernel_linear_cross_entropy_bwd);
}
#endif
