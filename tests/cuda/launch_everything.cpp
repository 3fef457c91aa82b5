// Runs every CUDA launcher on every path once for each order of the threads, in heap memory of
// exactly the right sizes. Built with sanitizers, by test_cuda_sanitize.py; the values are judged by
// test_cuda_host.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

int64_t bytes_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }
Buffer floats(int64_t n) { return Buffer(n, DType::F32); }

void run_gelu(int64_t n, bool tanh_form, DType dtype) {
  const Buffer x(n, dtype), dy(n, dtype), out(n, dtype);
  gptfast::cuda::gelu_fwd(x, out, n, tanh_form, dtype, nullptr);
  gptfast::cuda::gelu_bwd(dy, x, out, n, tanh_form, dtype, nullptr);
}

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

void run_bias_gelu(int64_t M, int64_t N, bool tanh_form, DType dtype) {
  const int64_t programs = M < 3 ? M : 3;
  const Buffer x(M * N, dtype), dy(M * N, dtype), out(M * N, dtype), bias = floats(N);
  const Buffer db = floats(N), partial = floats(programs * N);
  gptfast::cuda::bias_gelu_fwd(x, bias, DType::F32, out, M, N, tanh_form, dtype, nullptr);
  gptfast::cuda::bias_gelu_bwd(dy, x, bias, DType::F32, out, db, partial, programs, M, N, tanh_form,
                               dtype, nullptr);
}

void run_glu(int64_t M, int64_t N, int activation, DType dtype) {
  const Buffer dy(M * N, dtype), y(M * N, dtype);
  const Buffer both(2 * M * N, dtype), grad(2 * M * N, dtype);
  const auto up = [&](const Buffer& of) { return of.bytes.get() + N * bytes_of(dtype); };
  gptfast::cuda::glu_fwd(both, up(both), y, 2 * N, 2 * N, M, N, activation, dtype, nullptr);
  gptfast::cuda::glu_bwd(dy, both, up(both), grad, up(grad), 2 * N, 2 * N, 2 * N, M, N, activation,
                         dtype, nullptr);
}

void run_layer_norm(int64_t M, int64_t N, int64_t shared_bytes, bool rms, DType dtype) {
  const int64_t programs = M < 3 ? M : 3;
  const Buffer x(M * N, dtype), dy(M * N, dtype), out(M * N, dtype), w(N, dtype);
  const Buffer b = floats(N), rstd = floats(M), dw = floats(N), db = floats(N);
  const Buffer mean = rms ? Buffer() : floats(M), partial = floats(programs * 2 * N);
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

// A (B, H, T, D) tensor that lies in memory as (B, T, H, D).
gptfast::cuda::Heads heads(const Buffer& x, int64_t H, int64_t T, int64_t D) {
  return {x, T * H * D, D, H * D};
}

// What came before its copy was there would be NaN.
void require_finite(const char* what, const Buffer& x, int64_t n, DType dtype) {
  gptfast::cuda::with_dtype(dtype, [&](auto t) {
    const auto* values = reinterpret_cast<const decltype(t)*>(x.bytes.get());
    for (int64_t i = 0; i < n; ++i)
      if (!std::isfinite(gptfast::cuda::to_float(values[i]))) {
        std::fprintf(stderr, "%s: not finite at %ld\n", what, static_cast<long>(i));
        std::exit(1);
      }
  });
}

constexpr int64_t B = 2, H = 4, H_kv = 2;

void run_attention(int64_t T, int64_t S, int64_t D, int64_t left, int64_t right, DType dtype) {
  const Buffer q(B * H * T * D, dtype), k(B * H_kv * S * D, dtype), v(B * H_kv * S * D, dtype);
  const Buffer o(B * H * T * D, dtype), lse = floats(B * H * T);
  gptfast::cuda::attention_fwd(heads(q, H, T, D), heads(k, H_kv, S, D), heads(v, H_kv, S, D),
                               heads(o, H, T, D), {lse, H * T, T}, nullptr, nullptr, B, H, H_kv, T,
                               S, D, D, 0.2f, left, right, dtype, nullptr);
  require_finite("attention", o, B * H * T * D, dtype);
}

void run_attention_varlen(int64_t D, DType dtype) {
  const int32_t ends_q[] = {0, 5, 5, 75}, ends_k[] = {0, 9, 12, 112};
  const int64_t N = ends_q[3], N_k = ends_k[3];
  const Buffer q(N * H * D, dtype), k(N_k * H_kv * D, dtype), v(N_k * H_kv * D, dtype);
  const Buffer o(N * H * D, dtype), lse = floats(H * N);
  gptfast::cuda::attention_fwd({q, 0, D, H * D}, {k, 0, D, H_kv * D}, {v, 0, D, H_kv * D},
                               {o, 0, D, H * D}, {lse, 0, N}, ends_q, ends_k, 3, H, H_kv, 70, 100,
                               D, D, 0.2f, -1, 0, dtype, nullptr);
  require_finite("attention_varlen", o, N * H * D, dtype);
}

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

void run_sample(int64_t B, int64_t V, float steps, int64_t top_k, int64_t share, DType dtype) {
  const Buffer logits(B * V, dtype);
  const auto tokens = std::make_unique<int64_t[]>(B), previous = std::make_unique<int64_t[]>(B * 4);
  for (int64_t i = 0; i < B * 4; ++i) previous[i] = i % V - 1;
  gptfast::cuda::sample(logits, V, previous.get(), 4, 4, tokens.get(), B, V, 1.5f, steps, top_k,
                        share, int64_t{1} << 30, 7, 8, dtype, nullptr);
}

}  // namespace

int main() {
  constexpr int64_t kPlenty = 160 * 1024;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    cuda_on_cpu::seed = seed;
    for (const DType dtype : {DType::F32, DType::BF16}) {
      for (const int64_t n : {1, 37, 2051}) run_gelu(n, seed == 0, dtype);
      for (const int64_t n : {5, 8, 6001}) run_adamw(n, seed == 0, n == 8 ? -1.0 : 1.0, dtype);
      for (const int64_t N : {7, 300}) run_bias_gelu(70, N, seed == 0, dtype);
      for (const int64_t N : {7, 4104}) run_glu(3, N, static_cast<int>(seed), dtype);
      run_layer_norm(5, 64, kPlenty, seed == 1, dtype);    // a warp a row
      run_layer_norm(5, 768, kPlenty, false, dtype);       // a pack a thread
      run_layer_norm(3, 37, kPlenty, false, dtype);        // not aligned
      run_layer_norm(2, 257, kPlenty, false, dtype);       // and wide
      run_layer_norm(2, 4104, kPlenty, seed == 1, dtype);  // wide, all in shared memory
      run_layer_norm(2, 4104, 8 * 4104, false, dtype);     // only the sums
      run_layer_norm(2, 4104, 0, false, dtype);            // nothing
      for (const int64_t N : {37, 64, 768}) run_add_layer_norm(5, N, kPlenty, dtype);
      run_add_layer_norm(2, 4104, kPlenty, dtype);    // wide, all in shared memory
      run_add_layer_norm(2, 4104, 12 * 4104, dtype);  // only the sums
      run_add_layer_norm(2, 4104, 0, dtype);          // nothing
      run_cross_entropy(3, 37, 0.0f, false, dtype);
      run_cross_entropy(2, 4097, 0.1f, true, dtype);
      run_linear_decode(1, 16, 64, false, dtype);
      run_linear_decode(3, 37, 131, true, dtype);   // nothing is whole
      run_linear_decode(18, 20, 600, true, dtype);  // rows in two parts, K in more than one
      run_sample(2, 37, 0.0f, 37, int64_t{1} << 31, dtype);  // greedy
      run_sample(2, 2500, 3e7f, 2500, int64_t{1} << 31, dtype);
      run_sample(1, 2501, 3e7f, 40, int64_t{1} << 30, dtype);
    }
  }
  for (const DType dtype : {DType::BF16, DType::F16}) {
    cuda_on_cpu::seed = 1;
    run_attention(70, 90, 64, -1, 0, dtype);
    run_attention(150, 150, 64, 20, 3, dtype);
    run_attention(20, 70, 88, -1, -1, dtype);
    run_attention(20, 70, 128, -1, 0, dtype);
    run_attention(20, 40, 256, -1, 0, dtype);
    run_attention_varlen(64, dtype);
    for (const int64_t D : {64, 96, 128, 256}) run_attention_decode(1, D, 1, false, dtype);
    run_attention_decode(3, 64, 3, true, dtype);
    run_attention_decode(11, 64, 2, false, dtype);  // two blocks of rows
  }
  std::puts("ran everything");
}
