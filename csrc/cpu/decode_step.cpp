// One step of decoding: T new tokens of each of B sequences, M = B T rows, at most 16, through a whole
// GPT, in one call.
//
//   x = wte[token] + wpe[position]
//   for each layer:  x += attn(ln_1(x));  x += mlp(ln_2(x))      logits = ln_f(x) W^T
//
// Every product is one of linear_decode.h, fp32 stands between them, and the new keys and values go
// into the cache. A team of threads lives for the whole step and meets at barriers: after each
// product, whose output channels it shares, and after attention, whose heads it shares. What belongs
// to a row of x alone (norms, residual sums, the forms that products read) is shared by rows, or done
// by every thread for itself where there is only one row: that takes less time than a barrier.
#include <omp.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "linear_decode.h"

namespace gptfast {

// The plan that gptfast/decoder.py lays out: fields of eight bytes, in this order.
struct NormPlan {
  const float *w, *b;  // b may be null
  double eps;
};
struct LinearPlan {
  const void *data, *scale;
  const uint8_t* zero;
  const float* bias;  // may be null
  int64_t format, N, K;
};
struct LayerPlan {
  NormPlan ln_1;
  LinearPlan c_attn, attn_proj;
  NormPlan ln_2;
  LinearPlan c_fc, mlp_proj;
  void *keys, *values;  // (B, H_kv, max_length, D)
};
struct ModelPlan {
  int64_t layers, C, H, H_kv, D, V, max_length, threads;
  int64_t dtype, cache_dtype;  // of the embeddings, of the cache
  const void *wte, *wpe;
  NormPlan ln_f;
  LinearPlan head;
};

}  // namespace gptfast

// plan: a ModelPlan and its LayerPlans behind it. tokens (B, T); length: tokens in the cache before.
// workspace holds decode_workspace(plan, M) floats for the most rows M that it is used for.
// logits (B, V) are those of the last tokens.
DECLARE_KERNEL(decode_workspace, int64_t(const void* plan, int64_t M))
DECLARE_KERNEL(decode_step, void(const void* plan, const int64_t* tokens, int64_t B, int64_t T,
                                 int64_t length, float* workspace, float* logits))

namespace gptfast::GPTFAST_ISA {
namespace {

Weight as_weight(const LinearPlan& p) {
  return {p.data, p.scale, p.zero, p.N, p.K, static_cast<WeightFormat>(p.format)};
}

int64_t up_to_line(int64_t floats) { return (floats + 15) / 16 * 16; }

// The buffers of a step. Rows that are private have a copy for each thread.
struct Buffers {
  int64_t x, rows, private_floats;        // residual stream, the product's operand
  int64_t qkv, attended, branch, hidden;  // shared
  int64_t scores;                         // a row for each thread
  int64_t shared_floats;

  Buffers(const ModelPlan& p, const LayerPlan* layers, int64_t M) {
    const int64_t F = layers->c_fc.N;
    x = 0;
    rows = up_to_line(M * p.C);
    private_floats = rows + up_to_line(RowsOfX::floats(std::max(p.C, F)));
    qkv = 0;
    attended = qkv + up_to_line(M * (p.H + 2 * p.H_kv) * p.D);
    branch = attended + up_to_line(M * p.H * p.D);
    hidden = branch + up_to_line(M * p.C);
    scores = hidden + up_to_line(M * F);
    shared_floats = scores + p.threads * up_to_line(p.max_length);
  }
};

// One thread of the team.
class Step {
 public:
  Step(const ModelPlan& p, const LayerPlan* layers, const int64_t* tokens, int64_t B, int64_t T,
       int64_t length, float* workspace, float* logits, int64_t thread, int64_t team)
      : p_(p),
        layers_(layers),
        tokens_(tokens),
        B_(B),
        T_(T),
        M_(B * T),
        length_(length),
        logits_(logits),
        thread_(thread),
        team_(team),
        alone_(M_ == 1) {
    const Buffers at(p, layers, M_);
    float* own = workspace + at.shared_floats + (alone_ ? thread * at.private_floats : 0);
    x_ = own + at.x;
    rows_ = own + at.rows;
    qkv_ = workspace + at.qkv;
    attended_ = workspace + at.attended;
    branch_ = workspace + at.branch;
    hidden_ = workspace + at.hidden;
    scores_ = workspace + at.scores + thread * up_to_line(p.max_length);
  }

  void run() {
    for_each_row([&](int64_t m) { embed(m); });
    const float* from = nullptr;  // what the residual stream has not been given yet
    const float* bias = nullptr;
    for (int64_t l = 0; l < p_.layers; ++l) {
      const LayerPlan& layer = layers_[l];
      normalise(from, bias, layer.ln_1, layer.c_attn);
      product(layer.c_attn, true, Activation::NONE, qkv_);
      attend(layer);
      read(attended_, layer.attn_proj);
      product(layer.attn_proj, false, Activation::NONE, branch_);
      normalise(branch_, layer.attn_proj.bias, layer.ln_2, layer.c_fc);
      product(layer.c_fc, true, Activation::GELU_TANH, hidden_);
      read(hidden_, layer.mlp_proj);
      product(layer.mlp_proj, false, Activation::NONE, branch_);
      from = branch_;
      bias = layer.mlp_proj.bias;
    }
    normalise(from, bias, p_.ln_f, p_.head, T_);
    M_ = B_;
    product(p_.head, false, Activation::NONE, logits_);
  }

 private:
  void meet() const {
    if (team_ > 1) {
#pragma omp barrier
    }
  }
  template <class Body>
  void for_each_row(const Body& body) const {
    for (int64_t m = 0; m < M_; ++m)
      if (alone_ || m % team_ == thread_) body(m);
  }

  void embed(int64_t m) const {
    const int64_t C = p_.C;
    float* to = x_ + m * C;
    with_dtype(static_cast<DType>(p_.dtype), [&](auto t) {
      using T = decltype(t);
      const T* token = static_cast<const T*>(p_.wte) + tokens_[m] * C;
      const T* position = static_cast<const T*>(p_.wpe) + (length_ + m % T_) * C;
      for_each_vector(C, [&](int64_t j, auto part) {
        part.store(to + j, part.load(token + j) + part.load(position + j));
      });
    });
  }

  // x += from + bias; the operand of the product with `next` becomes norm(x), of every row, or of the
  // last one in each `stride`.
  void normalise(const float* from, const float* bias, const NormPlan& norm, const LinearPlan& next,
                 int64_t stride = 1) {
    const int64_t C = p_.C;
    const Weight w = as_weight(next);
    const RowsOfX rows(rows_, M_ / stride, C);
    for_each_row([&](int64_t m) {
      if ((m + 1) % stride) return;
      const int64_t to = m / stride;
      float *x = x_ + m * C, *y = rows.x + to * rows.stride();
      f32v sum{};
      for_each_vector(C, [&](int64_t j, auto part) {
        f32v v = part.load(x + j);
        if (from) {
          f32v branch = part.load(from + m * C + j);
          if (bias) branch += part.load(bias + j);
          v += branch;
          part.store(x + j, v);
        }
        sum += v;
      });
      const float mean = reduce_add(sum) / C;
      f32v squares{};
      for_each_vector(C, [&](int64_t j, auto part) {
        const f32v centred = part.live(part.load(x + j) - mean, f32v{});
        squares += centred * centred;
      });
      const float rstd = 1.0f / std::sqrt(reduce_add(squares) / C + static_cast<float>(norm.eps));
      for_each_vector(C, [&](int64_t j, auto part) {
        f32v v = (part.load(x + j) - mean) * rstd * part.load(norm.w + j);
        if (norm.b) v += part.load(norm.b + j);
        part.store(y + j, v);
      });
      prepare_row(w, rows, to);
    });
    if (!alone_) meet();
  }

  // `from` becomes the operand of the product with `next`.
  void read(const float* from, const LinearPlan& next) {
    const Weight w = as_weight(next);
    const RowsOfX rows(rows_, M_, w.K);
    for_each_row([&](int64_t m) {
      std::memcpy(rows.x + m * rows.stride(), from + m * w.K, w.K * sizeof(float));
      prepare_row(w, rows, m);
    });
    if (!alone_) meet();
  }

  void product(const LinearPlan& plan, bool add_bias, Activation activation, float* y) {
    const Weight w = as_weight(plan);
    const RowsOfX rows(rows_, M_, w.K);
    const int64_t panels = w.panels();
    alignas(64) PanelSums sums;
    for (int64_t i = panels * thread_ / team_; i < panels * (thread_ + 1) / team_; ++i) {
      panel_product(w, i, rows, sums);
      const float* bias = add_bias && plan.bias ? plan.bias + i * kPanel : nullptr;
      for (int64_t m = 0; m < M_; ++m)
        for_each_vector(w.channels(i), [&](int64_t c, auto part) {
          f32v z = load(sums[m] + c);
          if (bias) z += part.load(bias + c);
          part.store(y + m * w.N + i * kPanel + c, activate(z, activation));
        });
    }
    meet();
  }

  // Appends k and v of the new tokens to the cache, and lets their queries see it.
  void attend(const LayerPlan& layer) {
    with_dtype(static_cast<DType>(p_.cache_dtype), [&](auto t) {
      using T = decltype(t);
      const int64_t heads = B_ * p_.H_kv, S = p_.max_length, D = p_.D;
      for (int64_t i = thread_; i < heads; i += team_) {
        T* keys = static_cast<T*>(layer.keys) + i * S * D;
        T* values = static_cast<T*>(layer.values) + i * S * D;
        attend_head(i / p_.H_kv, i % p_.H_kv, keys, values);
      }
    });
    meet();
  }

  // The new tokens of sequence b and one head of keys: appended, then seen by the queries.
  template <class T>
  void attend_head(int64_t b, int64_t head, T* keys, T* values) {
    const int64_t D = p_.D, group = p_.H / p_.H_kv, width = (p_.H + 2 * p_.H_kv) * D;
    for (int64_t t = 0; t < T_; ++t) {
      const float* k = qkv_ + (b * T_ + t) * width + (p_.H + head) * D;
      const float* v = k + p_.H_kv * D;
      const int64_t at = (length_ + t) * D;
      for_each_vector(D, [&](int64_t d, auto part) {
        part.store(keys + at + d, part.load(k + d));
        part.store(values + at + d, part.load(v + d));
      });
    }
    for (int64_t m = b * T_; m < (b + 1) * T_; ++m)
      for (int64_t h = head * group; h < (head + 1) * group; ++h)
        attend_query(qkv_ + m * width + h * D, keys, values, length_ + m % T_ + 1,
                     attended_ + (m * p_.H + h) * D);
  }

  // o = softmax(q k^T / sqrt D) v over S keys.
  template <class T>
  void attend_query(const float* q, const T* keys, const T* values, int64_t S, float* o) {
    const int64_t D = p_.D;
    const float scale = 1.0f / std::sqrt(static_cast<float>(D));
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < S; ++s) {
      f32v dot{};
      for_each_vector(
          D, [&](int64_t d, auto part) { dot += part.load(q + d) * part.load(keys + s * D + d); });
      scores_[s] = reduce_add(dot) * scale;
      top = std::max(top, scores_[s]);
    }
    f32v sum{};
    for_each_vector(S, [&](int64_t s, auto part) {
      const f32v weight = part.live(exp(part.load(scores_ + s) - top), f32v{});
      part.store(scores_ + s, weight);
      sum += weight;
    });
    const float inverse = 1.0f / reduce_add(sum);
    for_each_vector(D, [&](int64_t d, auto part) {
      f32v acc{};
      for (int64_t s = 0; s < S; ++s) acc += scores_[s] * part.load(values + s * D + d);
      part.store(o + d, acc * inverse);
    });
  }

  const ModelPlan& p_;
  const LayerPlan* layers_;
  const int64_t* tokens_;
  int64_t B_, T_, M_, length_;
  float* logits_;
  int64_t thread_, team_;
  bool alone_;  // one row, which every thread prepares for itself
  float *x_, *rows_, *qkv_, *attended_, *branch_, *hidden_, *scores_;
};

int64_t decode_workspace(const void* plan, int64_t M) {
  const auto& p = *static_cast<const ModelPlan*>(plan);
  const auto* layers = reinterpret_cast<const LayerPlan*>(&p + 1);
  const Buffers at(p, layers, M);
  return at.shared_floats + (M == 1 ? p.threads : 1) * at.private_floats;
}

void decode_step(const void* plan, const int64_t* tokens, int64_t B, int64_t T, int64_t length,
                 float* workspace, float* logits) {
  const auto& p = *static_cast<const ModelPlan*>(plan);
  const auto* layers = reinterpret_cast<const LayerPlan*>(&p + 1);
  for (int64_t m = 0; m < B * T; ++m)
    if (tokens[m] < 0 || tokens[m] >= p.V)
      throw std::out_of_range("GPT: tokens must be in [0, " + std::to_string(p.V) + "), got " +
                              std::to_string(tokens[m]));
  if (p.threads == 1 || omp_in_parallel())
    return Step(p, layers, tokens, B, T, length, workspace, logits, 0, 1).run();
#pragma omp parallel num_threads(static_cast<int>(p.threads))
  Step(p, layers, tokens, B, T, length, workspace, logits, omp_get_thread_num(),
       omp_get_num_threads())
      .run();
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(decode_workspace)
REGISTER_KERNEL(decode_step)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_decode_step(pybind11::module_& m) {
  gptfast::bind_kernel(m, "decode_workspace", gptfast::kernel_decode_workspace);
  gptfast::bind_kernel(m, "decode_step", gptfast::kernel_decode_step);
}
#endif
