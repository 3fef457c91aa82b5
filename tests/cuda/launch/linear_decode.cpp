#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

// Bytes that may stand for anything.
std::unique_ptr<uint8_t[]> random_bytes(int64_t n) {
  auto bytes = std::make_unique<uint8_t[]>(n);
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(generator());
  return bytes;
}

void run_linear_decode(int64_t M, int64_t N, int64_t K, bool zero_points, DType dtype) {
  const int64_t panels = (N + 15) / 16, groups = (K + 31) / 32;
  const Buffer x(M * K, dtype), w(N * K, dtype), y(M * N, dtype), bias = floats(N);
  const Buffer scale = floats(N), scales(panels * groups * 16, DType::BF16);
  const auto int8 = random_bytes(panels * 16 * ((K + 63) / 64 * 64));
  const auto int4 = random_bytes(panels * groups * 256), zero = random_bytes(panels * groups * 16);
  const auto run = [&](const void* weight, const void* s, const uint8_t* z, int format) {
    gptfast::cuda::linear_decode_fwd(x, K, weight, s, z, bias, DType::F32, y, M, N, K, format, 1,
                                     dtype, nullptr);
  };
  run(w, nullptr, nullptr, static_cast<int>(dtype));
  run(int8.get(), scale, nullptr, 3);
  run(int4.get(), scales, zero_points ? zero.get() : nullptr, 4);
}

}  // namespace

void launch_all(DType dtype) {
  run_linear_decode(1, 16, 64, false, dtype);
  for (const int64_t M : {2, 3, 6}) run_linear_decode(M, 37, 131, true, dtype);  // nothing is whole
  run_linear_decode(18, 20, 600, true, dtype);  // rows in two parts, K in more than one
}
