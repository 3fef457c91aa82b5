// The launchers of the CUDA kernels: what Python calls, through bindings.cpp.
//
// Pointers are to device memory, contiguous unless said otherwise; Python has checked shapes,
// dtypes and devices. Launchers check what only they can know, and throw std::runtime_error where a
// launch fails. They work on the current device and return at once.
#pragma once
#include <driver_types.h>

#include <cstdint>

#include "../common/dtype.h"

namespace gptfast::cuda {

// tensors: (n_tensors, 12), chunks: (n_chunks, 2), each of `chunk` elements, hyper: (groups, 8), as
// `Tables` in gptfast/ops/adamw.py has them. max_norm: negative where nothing is clipped. grad_scale,
// found_inf, rounding_seed: one number each, or null. norm: one number, written where something is clipped. partial:
// (programs,), programs at least 1; scalars: (n_tensors, 8): scratch.
void adamw(const int64_t* tensors, const int64_t* chunks, const double* hyper, int64_t n_tensors,
           int64_t n_chunks, int64_t chunk, double max_norm, const float* grad_scale,
           const float* found_inf, const int64_t* rounding_seed, float* norm, float* partial,
           int64_t programs, float* scalars, cudaStream_t stream);

// (B, H, T, D) with contiguous D; strides in elements.
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};
// (B, H, T) with contiguous T.
struct Rows {
  float* data;
  int64_t stride_b, stride_h;
};

// (B, H) with contiguous H, or null.
struct Slopes {
  const float* data;
  int64_t stride_b;
};

// q: (B, H, T, D). k, v: (B, H_kv, S, D or Dv). o: (B, H, T, Dv). lse: (B, H, T). All in bfloat16
// or float16, at addresses and with strides that 16 bytes divide, as D and Dv are. ends_q, ends_k:
// (B + 1,) where the tokens of packed sequences end, or null: their stride_b is 0, T and S are those
// of the longest. left, right: keys that a query sees before and behind its diagonal, -1 for all.
void attention_fwd(Heads q, Heads k, Heads v, Heads o, Rows lse, const int32_t* ends_q,
                   const int32_t* ends_k, int64_t B, int64_t H, int64_t H_kv, int64_t T, int64_t S,
                   int64_t D, int64_t Dv, float scale, int64_t left, int64_t right, DType dtype,
                   cudaStream_t stream);

// The keys and values of the T newest tokens, (B, H_kv, T, D or Dv), or addresses of null where the
// caches hold them already. cos, sin: (T, half), or (B, T, half) with a stride_b, or null: they turn
// the first 2 half dimensions of new keys and of queries, see gptfast/ops/rope.py.
struct NewTokens {
  Heads k, v;
  const float *cos, *sin;
  int64_t stride_b;
  int half;
  bool interleaved;
};

// q as above, T at most 16. k_cache, v_cache: (pages, H_kv, tokens of a page, D or Dv). lengths: (B,).
// table: (B, max_pages), or null, with a page for each sequence. S: tokens that a sequence has room
// for. o: (B, T, H, Dv). lse: (B, H, T). With parts > 1 part_o (parts, B, T, H, Dv) and part_lse
// (parts, B, H, T) are needed.
void attention_decode_fwd(Heads q, Heads k_cache, Heads v_cache, NewTokens fresh,
                          const int32_t* lengths, const int32_t* table, int64_t max_pages,
                          int64_t page_size, Slopes slopes, void* o, float* lse, float* part_o,
                          float* part_lse, int64_t parts, int64_t B, int64_t H, int64_t H_kv,
                          int64_t T, int64_t S, int64_t D, int64_t Dv, float scale, int64_t left,
                          float softcap, DType dtype, cudaStream_t stream);

// x, y: (n,).
void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype, cudaStream_t stream);
void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype,
              cudaStream_t stream);

// x, y: (M, N). bias: (N,), in a dtype of its own.
void bias_gelu_fwd(const void* x, const void* bias, DType bias_dtype, void* y, int64_t M, int64_t N,
                   bool tanh_form, DType dtype, cudaStream_t stream);
// dx, db: null where nobody asked. partial: (programs, N), needed for db.
void bias_gelu_bwd(const void* dy, const void* x, const void* bias, DType bias_dtype, void* dx,
                   float* db, float* partial, int64_t programs, int64_t M, int64_t N,
                   bool tanh_form, DType dtype, cudaStream_t stream);

// gate, up, y: (M, N); rows of gate and up lie stride_gate and stride_up apart. activation: its
// position in ACTIVATIONS of gptfast/ops/glu.py.
void glu_fwd(const void* gate, const void* up, void* y, int64_t stride_gate, int64_t stride_up,
             int64_t M, int64_t N, int activation, DType dtype, cudaStream_t stream);
// dgate, dup: null where nobody asked; their rows lie stride_grad apart.
void glu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
             int64_t stride_gate, int64_t stride_up, int64_t stride_grad, int64_t M, int64_t N,
             int activation, DType dtype, cudaStream_t stream);

// LayerNorm of r = residual + z (x + x_bias), or of x without a residual; r is then not written. All
// of these, and y: (M, N). residual and r have r_dtype: x's, or fp32. x_bias, w, b: (N,) or null, in
// dtypes of their own. seed: of the dropout mask, on the device; null: no dropout. mean, rstd: (M,).
// mean is null for RMSNorm, here and in backward. shared_bytes: what a block may use on this card.
void layer_norm_fwd(const void* x, const void* residual, const void* x_bias, DType x_bias_dtype,
                    const void* w, DType w_dtype, const void* b, DType b_dtype, const int64_t* seed,
                    int64_t threshold, void* y, void* r, float* mean, float* rstd, int64_t M,
                    int64_t N, float eps, int64_t shared_bytes, DType r_dtype, DType x_dtype,
                    cudaStream_t stream);
// dy, and dr, the gradient of r: null where there is none. dresidual, dx, dw, db, dx_bias: null where
// nobody asked; without a residual x's gradient is dresidual. partial: (programs, 3, N), or of 2
// without dx_bias, or of 1 without db either: needed for dw, db and dx_bias, each row sums the rows p,
// p + programs, ... of r.
// c1_c2: (M, 2), needed for dx_bias.
void layer_norm_bwd(const void* r, const void* dy, const void* dr, const void* w, DType w_dtype,
                    const float* mean, const float* rstd, const int64_t* seed, int64_t threshold,
                    void* dresidual, void* dx, float* dw, float* db, float* dx_bias, float* partial,
                    float* c1_c2, int64_t programs, int64_t M, int64_t N, int64_t shared_bytes,
                    DType x_dtype, DType r_dtype, cudaStream_t stream);

// x: (M, V). target: (M,). w: (V,) or null, in its own dtype. loss, lse: (M,). A target that is
// neither in [0, V) nor ignore_index makes its loss NaN. softcap: 0 for none.
void cross_entropy_fwd(const void* x, const int64_t* target, const void* w, DType w_dtype,
                       float* loss, float* lse, int64_t M, int64_t V, int64_t ignore_index,
                       float smoothing, float z_loss, float softcap, DType dtype,
                       cudaStream_t stream);
// w_sum: the sum of w, on the device; null where w is. dx may be x.
void cross_entropy_bwd(const float* dloss, const void* x, const int64_t* target, const void* w,
                       DType w_dtype, const float* w_sum, const float* lse, void* dx, int64_t M,
                       int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                       float softcap, DType dtype, cudaStream_t stream);
// Both in one read of x, where a row and 16 bytes more fit into shared_bytes of shared memory; of what
// does not fit, in two. dx may be x.
void cross_entropy_fused(const float* dloss, const void* x, const int64_t* target, const void* w,
                         DType w_dtype, float* loss, void* dx, int64_t M, int64_t V,
                         int64_t ignore_index, float smoothing, float z_loss, float softcap,
                         int64_t shared_bytes, DType dtype, cudaStream_t stream);

// y = act(x W^T + b). x: (M, K), rows stride_x elements apart. weight, scale, zero: as
// gptfast/ops/linear_decode.py describes them, the packed ones aligned to 16 bytes; scale, zero and
// bias (N,) may be null. y: (M, N). format, activation: codes of csrc/cpu/linear_decode.h.
void linear_decode_fwd(const void* x, int64_t stride_x, const void* weight, const void* scale,
                       const uint8_t* zero, const void* bias, DType bias_dtype, void* y, int64_t M,
                       int64_t N, int64_t K, int format, int activation, DType dtype,
                       cudaStream_t stream);

// logits: (B, V), rows stride_row elements apart; V at most 2^18. previous: (B, P), rows
// stride_previous apart, null where P is 0; what is not in [0, V) counts as absent. tokens: (B,).
// The other numbers are SamplingRule's, of csrc/common/sampling.h.
void sample(const void* logits, int64_t stride_row, const int64_t* previous,
            int64_t stride_previous, int64_t P, int64_t* tokens, int64_t B, int64_t V,
            float penalty, float steps, int64_t top_k, int64_t share, int64_t min_weight,
            uint64_t seed, uint64_t offset, DType dtype, cudaStream_t stream);

}  // namespace gptfast::cuda
