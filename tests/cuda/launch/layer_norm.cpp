#include "launch.h"

const DType kDTypes[] = {DType::F32, DType::BF16};

namespace {

void run_layer_norm(int64_t M, int64_t N, int64_t shared_bytes, bool rms, DType dtype) {
  const int64_t programs = M < 3 ? M : 3;
  const Buffer x(M * N, dtype), dy(M * N, dtype), out(M * N, dtype), w(N, dtype);
  const Buffer b = floats(N), rstd = floats(M), dw = floats(N), db = rms ? Buffer() : floats(N);
  const Buffer mean = rms ? Buffer() : floats(M), partial = floats(programs * (rms ? 1 : 2) * N);
  gptfast::cuda::layer_norm_fwd(x, nullptr, nullptr, dtype, w, dtype, b, DType::F32, nullptr, 0,
                                out, nullptr, mean, rstd, M, N, 1e-5f, shared_bytes, dtype, dtype,
                                nullptr);
  gptfast::cuda::layer_norm_bwd(x, dy, nullptr, w, dtype, mean, rstd, nullptr, 0, out, nullptr, dw,
                                db, nullptr, partial, nullptr, programs, M, N, shared_bytes, dtype,
                                dtype, nullptr);
}

// Behind the residual sum, which is fp32, with a bias and dropout.
void run_add_layer_norm(int64_t M, int64_t N, int64_t shared_bytes, DType dtype) {
  const int64_t programs = M < 3 ? M : 3, seed = 7, threshold = 50000;
  const Buffer x(M * N, dtype), dy(M * N, dtype), y(M * N, dtype), dx(M * N, dtype), w(N, dtype);
  const Buffer residual = floats(M * N), r = floats(M * N), dr = floats(M * N), b = floats(N);
  const Buffer dresidual = floats(M * N), mean = floats(M), rstd = floats(M), dw = floats(N);
  const Buffer db = floats(N), db2 = floats(N), partial = floats(programs * 3 * N);
  const Buffer c1_c2 = floats(2 * M);
  gptfast::cuda::layer_norm_fwd(x, residual, b, DType::F32, w, dtype, b, DType::F32, &seed,
                                threshold, y, r, mean, rstd, M, N, 1e-5f, shared_bytes, DType::F32,
                                dtype, nullptr);
  gptfast::cuda::layer_norm_bwd(r, dy, dr, w, dtype, mean, rstd, &seed, threshold, dresidual, dx,
                                dw, db, db2, partial, c1_c2, programs, M, N, shared_bytes, dtype,
                                DType::F32, nullptr);
}

}  // namespace

void launch_all(DType dtype) {
  constexpr int64_t kPlenty = 160 * 1024;
  const int64_t wide = 512 * 16 / bytes_of(dtype) + 8;  // more than a pack a thread
  for (const bool rms : {false, true}) run_layer_norm(5, 64, kPlenty, rms, dtype);  // a warp a row
  run_layer_norm(5, 768, kPlenty, false, dtype);    // a pack a thread
  run_layer_norm(3, 37, kPlenty, true, dtype);      // not aligned
  run_layer_norm(2, 257, kPlenty, false, dtype);    // and wide
  run_layer_norm(2, wide, kPlenty, true, dtype);    // all in shared memory
  run_layer_norm(2, wide, 8 * wide, false, dtype);  // only the sums
  run_layer_norm(2, wide, 6 * wide, true, dtype);   // and some columns
  run_layer_norm(2, wide, wide, false, dtype);      // only some columns
  run_layer_norm(2, wide, 0, false, dtype);         // nothing
  for (const int64_t N : {37, 64, 768}) run_add_layer_norm(5, N, kPlenty, dtype);
  for (const int64_t bytes : {kPlenty, 12 * wide, int64_t{0}})
    run_add_layer_norm(2, wide, bytes, dtype);
}
