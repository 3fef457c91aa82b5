#include "launch.h"

const DType kDTypes[] = {DType::BF16, DType::F16};

namespace {

void run_attention_decode(int64_t T, int64_t D, int64_t parts, bool paged, DType dtype) {
  const int64_t S = 300, page_size = paged ? 7 : S, max_pages = (S + page_size - 1) / page_size;
  const int64_t pages = B * max_pages, slot = H_kv * D;
  const Buffer q(B * H * T * D, dtype), k(pages * page_size * slot, dtype);
  const Buffer v(pages * page_size * slot, dtype), o(B * H * T * D, dtype);
  const Buffer part_o = floats(parts * B * H * T * D), part_lse = floats(parts * B * H * T);
  const Buffer lse = floats(B * H * T), slopes = floats(H), angles = floats(B * T * D / 2);
  const Buffer new_k(B * H_kv * T * D, dtype), new_v(B * H_kv * T * D, dtype);
  const int32_t lengths[B] = {300, 41};
  const auto table = std::make_unique<int32_t[]>(pages);
  for (int64_t i = 0; i < pages; ++i) table[i] = static_cast<int32_t>(pages - 1 - i);
  const gptfast::cuda::Heads keys{k, page_size * slot, D, slot},
      values{v, page_size * slot, D, slot};
  gptfast::cuda::NewTokens fresh{};
  if (T > 1)
    fresh = {heads(new_k, H_kv, T, D),
             heads(new_v, H_kv, T, D),
             angles,
             angles,
             T * D / 2,
             static_cast<int>(D / 2),
             paged};
  gptfast::cuda::attention_decode_fwd(
      heads(q, H, T, D), keys, values, fresh, lengths, paged ? table.get() : nullptr, max_pages,
      page_size, {slopes, 0}, o, lse, part_o, part_lse, parts, B, H, H_kv, T, S, D, D, 0.2f,
      paged ? 100 : -1, paged ? 5.0f : 0.0f, dtype, nullptr);
  require_finite("attention_decode", o, B * H * T * D, dtype);
}

}  // namespace

void launch_all(DType dtype) {
  for (const int64_t D : {64, 96, 128, 256}) run_attention_decode(1, D, 1, false, dtype);
  run_attention_decode(3, 64, 3, true, dtype);
  run_attention_decode(11, 64, 2, false, dtype);  // two blocks of rows
}
