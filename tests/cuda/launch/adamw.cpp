#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

// One tensor, of which the last chunk is no whole one.
void run_adamw(int64_t n, bool master, double max_norm, DType dtype) {
  const Buffer p(n, dtype), g(n, dtype), m = floats(n), v = floats(n);
  const Buffer wide = master ? floats(n) : Buffer(), step = floats(1), norm = floats(1);
  for (int64_t i = 0; i < n; ++i) static_cast<float*>(v)[i] *= static_cast<float*>(v)[i];
  static_cast<float*>(step)[0] = 1.0f;
  const auto address = [](const void* x) { return reinterpret_cast<int64_t>(x); };
  const int64_t code = static_cast<int64_t>(dtype), chunk = 2048, chunks = (n + chunk - 1) / chunk;
  const int64_t tensors[12] = {address(p),    address(g), address(m), address(v), address(wide),
                               address(step), 0,          n,          0,          code,
                               code,          1};
  const double hyper[8] = {0.1, 0.9, 0.99, std::log(0.9), std::log(0.99), 1e-8, 0.1, 1.0};
  const auto table = std::make_unique<int64_t[]>(2 * chunks);
  for (int64_t i = 0; i < chunks; ++i) table[2 * i + 1] = i;
  const Buffer partial = floats(2), scalars = floats(8), scale = floats(1);
  const int64_t seed = 7;
  gptfast::cuda::adamw(tensors, table.get(), hyper, 1, chunks, chunk, max_norm, scale, nullptr,
                       master ? nullptr : &seed, norm, partial, chunks < 2 ? chunks : 2, scalars,
                       nullptr);
}

}  // namespace

void launch_all(DType dtype) {
  for (const bool master : {true, false})
    for (const int64_t n : {5, 8, 6001}) run_adamw(n, master, n == 8 ? -1.0 : 1.0, dtype);
}
