// Rotary position embedding of queries and keys, and its gradient: the rotation back.
//
//   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin
//
// Pairs are (i, i + R/2), or interleaved (2 i, 2 i + 1), of the first R dimensions; the others pass.
// Threads share the tokens. A token's heads of q and of k are turned one after another, since they
// need the same row of cos and sin; everything is read or written once.
#include "heads.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace gptfast {

struct RopeShape {
  int64_t B, H, H_kv, T, D;  // H_kv is 0 without k
  int64_t half;              // R / 2
  int64_t stride_table_b;    // of cos and sin (B, T, R/2); 0: for all sequences the same
};

}  // namespace gptfast

// q_out and k_out may lie anywhere. With `back` the rotation is by the opposite angles.
DECLARE_KERNEL(rope,
               void(Heads q, Heads q_out, Heads k, Heads k_out, const float* cos, const float* sin,
                    RopeShape shape, bool interleaved, bool back, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread: about 5 us of work, the price of a fork

// Neighbours change places.
inline f32v swap_pairs(f32v v) {
#if GPTFAST_VECTOR_BYTES == 64
  return _mm512_permute_ps(v, 0xb1);
#elif GPTFAST_VECTOR_BYTES == 32
  return _mm256_permute_ps(v, 0xb1);
#else
  return f32v{v[1], v[0], v[3], v[2]};
#endif
}

template <class T>
void turn_halves(const T* x, T* y, const float* cos, const float* sin, float sign, int64_t half) {
  for_each_vector(half, [&](int64_t i, auto part) {
    const f32v c = part.load(cos + i), s = part.load(sin + i) * sign;
    const f32v x1 = part.load(x + i), x2 = part.load(x + half + i);
    part.store(y + i, x1 * c - x2 * s);
    part.store(y + half + i, x2 * c + x1 * s);
  });
}

// cos: c0 c0 c1 c1 ...; sin: -s0 s0 -s1 s1 ...
template <class T>
void turn_pairs(const T* x, T* y, const float* cos, const float* sin, int64_t R) {
  for_each_vector(R, [&](int64_t i, auto part) {
    const f32v v = part.load(x + i);
    part.store(y + i, v * part.load(cos + i) + swap_pairs(v) * part.load(sin + i));
  });
}

template <class T>
void turn(Heads q, Heads q_out, Heads k, Heads k_out, const float* cos, const float* sin,
          const RopeShape& shape, bool interleaved, bool back) {
  const int64_t half = shape.half, R = 2 * half, heads = shape.H + shape.H_kv;
  const float sign = back ? -1.0f : 1.0f;
  parallel_for(shape.B * shape.T, kGrain / (heads * shape.D + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 static thread_local Scratch scratch;
                 float *cos_pairs = nullptr, *sin_pairs = nullptr;
                 if (interleaved) cos_pairs = scratch.reserve(2 * R), sin_pairs = cos_pairs + R;
                 for (int64_t token = begin; token < end; ++token) {
                   const int64_t b = token / shape.T, t = token % shape.T;
                   const float* c = cos + b * shape.stride_table_b + t * half;
                   const float* s = sin + b * shape.stride_table_b + t * half;
                   if (interleaved)
                     for (int64_t i = 0; i < half; ++i) {
                       cos_pairs[2 * i] = cos_pairs[2 * i + 1] = c[i];
                       sin_pairs[2 * i] = -sign * s[i], sin_pairs[2 * i + 1] = sign * s[i];
                     }
                   for (int64_t head = 0; head < heads; ++head) {
                     const bool is_q = head < shape.H;
                     const int64_t h = is_q ? head : head - shape.H;
                     const T* x = row<const T>(is_q ? q : k, b, h, t);
                     T* y = row<T>(is_q ? q_out : k_out, b, h, t);
                     if (interleaved)
                       turn_pairs(x, y, cos_pairs, sin_pairs, R);
                     else
                       turn_halves(x, y, c, s, sign, half);
                     std::memcpy(y + R, x + R, (shape.D - R) * sizeof(T));
                   }
                 }
               });
}

void rope(Heads q, Heads q_out, Heads k, Heads k_out, const float* cos, const float* sin,
          RopeShape shape, bool interleaved, bool back, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    turn<decltype(t)>(q, q_out, k, k_out, cos, sin, shape, interleaved, back);
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(rope)

#ifdef GPTFAST_BASELINE
namespace gptfast {
template <>
struct FromPython<RopeShape> {
  using type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  static RopeShape get(type t) {
    return std::apply([](auto... field) { return RopeShape{field...}; }, t);
  }
};
}  // namespace gptfast
void register_rope(pybind11::module_& m) { gptfast::bind_kernel(m, "rope", gptfast::kernel_rope); }
#endif
