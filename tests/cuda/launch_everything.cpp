// Runs every CUDA launcher on every path once for each order of the threads, in heap memory of
// exactly the right sizes. Built with sanitizers, by test_cuda_sanitize.py; the values are judged by
// test_cuda_host.py.
#include <cstdio>
#include <memory>
#include <random>

#include "../../csrc/cuda/common.cuh"
#include "../../csrc/cuda/launchers.h"

namespace {

using gptfast::DType;
std::mt19937 generator(1);

// `n` random elements of a dtype, or null for none.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  Buffer() = default;
  Buffer(int64_t n, DType dtype) {
    gptfast::cuda::with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      bytes = std::make_unique<char[]>(n * sizeof(T));
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<T*>(bytes.get())[i] = gptfast::cuda::from_float<T>(normal(generator));
    });
  }
  operator void*() const { return bytes.get(); }
  operator float*() const { return reinterpret_cast<float*>(bytes.get()); }
};

Buffer floats(int64_t n) { return Buffer(n, DType::F32); }

void run_gelu(int64_t n, bool tanh_form, DType dtype) {
  const Buffer x(n, dtype), dy(n, dtype), out(n, dtype);
  gptfast::cuda::gelu_fwd(x, out, n, tanh_form, dtype, nullptr);
  gptfast::cuda::gelu_bwd(dy, x, out, n, tanh_form, dtype, nullptr);
}

void run_layer_norm(int64_t M, int64_t N, int64_t shared_bytes, bool rms, DType dtype) {
  const int64_t programs = M < 3 ? M : 3;
  const Buffer x(M * N, dtype), dy(M * N, dtype), out(M * N, dtype), w(N, dtype);
  const Buffer b = floats(N), rstd = floats(M), dw = floats(N), db = floats(N);
  const Buffer mean = rms ? Buffer() : floats(M), partial = floats(programs * 2 * N);
  gptfast::cuda::layer_norm_fwd(x, w, dtype, b, DType::F32, out, mean, rstd, M, N, 1e-5f,
                                shared_bytes, dtype, nullptr);
  gptfast::cuda::layer_norm_bwd(dy, x, w, dtype, mean, rstd, out, dw, db, partial, programs, M, N,
                                shared_bytes, dtype, nullptr);
}

void run_cross_entropy(int64_t M, int64_t V, float smoothing, bool weighted, DType dtype) {
  const Buffer x(M * V, dtype), dx(M * V, dtype), loss = floats(M), lse = floats(M);
  const Buffer w = weighted ? Buffer(V, dtype) : Buffer(), w_sum = floats(1);
  const auto target = std::make_unique<int64_t[]>(M);
  for (int64_t i = 0; i < M; ++i) target[i] = i % 3 == 2 ? -100 : (i * 7) % V;
  gptfast::cuda::cross_entropy_fwd(x, target.get(), w, dtype, loss, lse, M, V, -100, smoothing,
                                   1e-4f, 30.0f, dtype, nullptr);
  gptfast::cuda::cross_entropy_bwd(loss, x, target.get(), w, dtype, w_sum, lse, dx, M, V, -100,
                                   smoothing, 1e-4f, 30.0f, dtype, nullptr);
}

}  // namespace

int main() {
  constexpr int64_t kPlenty = 160 * 1024;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    cuda_on_cpu::seed = seed;
    for (const DType dtype : {DType::F32, DType::BF16}) {
      for (const int64_t n : {1, 37, 2051}) run_gelu(n, seed == 0, dtype);
      run_layer_norm(5, 64, kPlenty, seed == 1, dtype);    // a warp a row
      run_layer_norm(5, 768, kPlenty, false, dtype);       // a pack a thread
      run_layer_norm(3, 37, kPlenty, false, dtype);        // not aligned
      run_layer_norm(2, 257, kPlenty, false, dtype);       // and wide
      run_layer_norm(2, 4104, kPlenty, seed == 1, dtype);  // wide, all in shared memory
      run_layer_norm(2, 4104, 8 * 4104, false, dtype);     // only the sums
      run_layer_norm(2, 4104, 0, false, dtype);            // nothing
      run_cross_entropy(3, 37, 0.0f, false, dtype);
      run_cross_entropy(2, 4097, 0.1f, true, dtype);
    }
  }
  std::puts("ran everything");
}
