#include "launch.h"

const DType kDTypes[] = {DType::BF16, DType::F16};

namespace {

void run_attention(int64_t T, int64_t S, int64_t D, int64_t left, int64_t right, DType dtype) {
  const Buffer q(B * H * T * D, dtype), k(B * H_kv * S * D, dtype), v(B * H_kv * S * D, dtype);
  const Buffer o(B * H * T * D, dtype), lse = floats(B * H * T);
  gptfast::cuda::attention_fwd(heads(q, H, T, D), heads(k, H_kv, S, D), heads(v, H_kv, S, D),
                               heads(o, H, T, D), {lse, H * T, T}, nullptr, nullptr, B, H, H_kv, T,
                               S, D, D, 0.2f, left, right, dtype, nullptr);
  require_finite("attention", o, B * H * T * D, dtype);
}

void run_attention_varlen(int64_t D, DType dtype) {
  const int32_t ends_q[] = {0, 5, 5, 75, 79}, ends_k[] = {0, 9, 12, 112, 112};
  const int64_t N = ends_q[4], N_k = ends_k[4];
  const Buffer q(N * H * D, dtype), k(N_k * H_kv * D, dtype), v(N_k * H_kv * D, dtype);
  const Buffer o(N * H * D, dtype), lse = floats(H * N);
  gptfast::cuda::attention_fwd({q, 0, D, H * D}, {k, 0, D, H_kv * D}, {v, 0, D, H_kv * D},
                               {o, 0, D, H * D}, {lse, 0, N}, ends_q, ends_k, 4, H, H_kv, 70, 100,
                               D, D, 0.2f, -1, 0, dtype, nullptr);
  require_finite("attention_varlen", o, N * H * D, dtype);
}

}  // namespace

void launch_all(DType dtype) {
  run_attention(70, 90, 64, -1, 0, dtype);
  run_attention(150, 150, 64, 20, 3, dtype);
  run_attention(20, 70, 88, -1, -1, dtype);
  run_attention(20, 70, 128, -1, 0, dtype);
  run_attention(20, 40, 256, -1, 0, dtype);
  run_attention_varlen(64, dtype);
}
