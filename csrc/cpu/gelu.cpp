// GELU, y = z Phi(z), elementwise, with z = x or x + bias; gated units, y = act(gate) up; gradients.
//
//   tanh:  Phi(x) ~ s(x) = sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3)
//          dy/dx = s + x s (1 - s) 2 u',  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
//   erf:   Phi(x) = erfc(-x / sqrt 2) / 2
//          dy/dx = Phi(x) + x phi(x),     phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
//   silu:  act(x) = x s(x),  s(x) = sigmoid(x);  act'(x) = s + x s (1 - s)
//
// Every tensor is read or written once, and the activation is recomputed in backward. dbias is summed
// by blocks of rows, a row of `partial` (blocks, N) each, and those in order.
#include "gelu_forms.h"
#include "isa.h"
#include "parallel.h"
#include "stream.h"

#include <algorithm>

DECLARE_KERNEL(gelu_fwd, void(const void* x, void* y, int64_t n, bool tanh_form, DType dtype))
DECLARE_KERNEL(gelu_bwd, void(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form,
                              DType dtype))
DECLARE_KERNEL(bias_gelu_fwd, void(const void* x, const float* bias, void* y, int64_t M, int64_t N,
                                   bool tanh_form, DType dtype))
DECLARE_KERNEL(bias_gelu_bwd, void(const void* dy, const void* x, const float* bias, void* dx,
                                   float* db, float* partial, int64_t blocks, int64_t M, int64_t N,
                                   bool tanh_form, DType dtype))
DECLARE_KERNEL(glu_fwd, void(const void* gate, const void* up, void* y, int64_t stride_gate,
                             int64_t stride_up, int64_t M, int64_t N, int activation, DType dtype))
DECLARE_KERNEL(glu_bwd, void(const void* dy, const void* gate, const void* up, void* dgate,
                             void* dup, int64_t stride_gate, int64_t stride_up, int64_t stride_grad,
                             int64_t M, int64_t N, int activation, DType dtype))

namespace gptfast::GPTFAST_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread: about 5 us of work, the price of a fork

// The forms by their codes, which are the positions in ACTIVATIONS of gptfast/ops/glu.py.
template <class Body>
inline void with_form(int activation, const Body& body) {
  switch (activation) {
    case 0: return body(SiluForm{});
    case 1: return body(ErfForm{});
    case 2: return body(TanhForm{});
  }
}

// Splits the elements of an (M, N) matrix over threads, at whole cache lines; body(i, j, n) gets n
// elements of row i from column j on.
template <class Body>
inline void for_each_piece(int64_t M, int64_t N, const Body& body) {
  constexpr int64_t kLine = 64;  // elements: at least a line of any dtype
  const int64_t elements = M * N;
  parallel_for((elements + kLine - 1) / kLine, kGrain / kLine, [&](int64_t first, int64_t last) {
    int64_t begin = first * kLine;
    const int64_t end = std::min(last * kLine, elements);
    while (begin < end) {
      const int64_t i = begin / N, j = begin % N, n = std::min(N - j, end - begin);
      body(i, j, n);
      begin += n;
    }
  });
}

template <class Form, class T>
void forward(const T* x, const float* bias, T* y, int64_t M, int64_t N) {
  with_stores(y, M, N, [&](auto out) {
    for_each_piece(M, N, [&](int64_t row, int64_t col, int64_t n) {
      const int64_t at = row * N + col;
      for_each_vector(n, [&](int64_t i, auto part) {
        read_ahead(x + at + i);
        f32v z = part.load(x + at + i);
        if (bias) z += part.load(bias + col + i);
        out.store(part, y + at + i, Form::value(z));
      });
    });
  });
}

template <class Form, class T>
void backward(const T* dy, const T* x, T* dx, int64_t n) {
  with_stores(dx, 1, n, [&](auto out) {
    for_each_piece(1, n, [&](int64_t, int64_t begin, int64_t size) {
      for_each_vector(size, [&](int64_t i, auto part) {
        read_ahead(x + begin + i);
        read_ahead(dy + begin + i);
        const f32v slope = slope_of<Form>(part.load(x + begin + i));
        out.store(part, dx + begin + i, part.load(dy + begin + i) * slope);
      });
    });
  });
}

template <class Form, class T>
void backward_with_bias(const T* dy, const T* x, const float* bias, T* dx, float* db,
                        float* partial, int64_t blocks, int64_t M, int64_t N) {
  const int64_t elements = std::max<int64_t>(M * N, 1);
  with_stores(dx, M, N, [&](auto out) {
    const int64_t grain = (kGrain * blocks + elements - 1) / elements;
    parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* sums = db ? partial + b * N : nullptr;
        if (db) std::memset(sums, 0, N * sizeof(float));
        for (int64_t row = b * M / blocks; row < (b + 1) * M / blocks; ++row)
          for_each_vector(N, [&](int64_t j, auto part) {
            read_ahead(x + row * N + j);
            read_ahead(dy + row * N + j);
            const f32v slope = slope_of<Form>(part.load(x + row * N + j) + part.load(bias + j));
            const f32v dz = part.load(dy + row * N + j) * slope;
            if (dx) out.store(part, dx + row * N + j, dz);
            if (db) part.store(sums + j, part.load(sums + j) + dz);
          });
      }
    });
  });
  if (!db) return;
  parallel_for(N, kGrain / blocks + W, [&](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t j, auto part) {
      f32v sum{};
      for (int64_t b = 0; b < blocks; ++b) sum += part.load(partial + b * N + begin + j);
      part.store(db + begin + j, sum);
    });
  });
}

template <class Form, class T>
void glu_forward(const T* gate, const T* up, T* y, int64_t stride_gate, int64_t stride_up,
                 int64_t M, int64_t N) {
  with_stores(y, M, N, [&](auto out) {
    for_each_piece(M, N, [&](int64_t row, int64_t col, int64_t n) {
      const T *g = gate + row * stride_gate + col, *u = up + row * stride_up + col;
      T* to = y + row * N + col;
      for_each_vector(n, [&](int64_t i, auto part) {
        out.store(part, to + i, Form::value(part.load(g + i)) * part.load(u + i));
      });
    });
  });
}

template <class Form, class T>
void glu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t stride_gate,
                  int64_t stride_up, int64_t stride_grad, int64_t M, int64_t N) {
  const bool aligned =
      has_aligned_stores(dgate, M, N, stride_grad) && has_aligned_stores(dup, M, N, stride_grad);
  const int64_t bytes =
      ((M - 1) * stride_grad + N) * sizeof(T);  // half of which may be the other's
  with_stores_if(aligned, dgate ? dgate : dup, bytes, [&](auto out) {
    for_each_piece(M, N, [&](int64_t row, int64_t col, int64_t n) {
      const T *g = gate + row * stride_gate + col, *u = up + row * stride_up + col;
      const int64_t at = row * stride_grad + col;
      for_each_vector(n, [&](int64_t i, auto part) {
        const f32v d = part.load(dy + row * N + col + i);
        f32v slope;
        const f32v value = Form::value(part.load(g + i), &slope);
        if (dgate) out.store(part, dgate + at + i, d * part.load(u + i) * slope);
        if (dup) out.store(part, dup + at + i, d * value);
      });
    });
  });
}

void bias_gelu_fwd(const void* x, const float* bias, void* y, int64_t M, int64_t N, bool tanh_form,
                   DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_gelu_form(tanh_form, [&](auto form) {
      forward<decltype(form)>(static_cast<const T*>(x), bias, static_cast<T*>(y), M, N);
    });
  });
}

void bias_gelu_bwd(const void* dy, const void* x, const float* bias, void* dx, float* db,
                   float* partial, int64_t blocks, int64_t M, int64_t N, bool tanh_form,
                   DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_gelu_form(tanh_form, [&](auto form) {
      backward_with_bias<decltype(form)>(static_cast<const T*>(dy), static_cast<const T*>(x), bias,
                                         static_cast<T*>(dx), db, partial, blocks, M, N);
    });
  });
}

void gelu_fwd(const void* x, void* y, int64_t n, bool tanh_form, DType dtype) {
  bias_gelu_fwd(x, nullptr, y, 1, n, tanh_form, dtype);
}

void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, bool tanh_form, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_gelu_form(tanh_form, [&](auto form) {
      backward<decltype(form)>(static_cast<const T*>(dy), static_cast<const T*>(x),
                               static_cast<T*>(dx), n);
    });
  });
}

void glu_fwd(const void* gate, const void* up, void* y, int64_t stride_gate, int64_t stride_up,
             int64_t M, int64_t N, int activation, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_form(activation, [&](auto form) {
      glu_forward<decltype(form)>(static_cast<const T*>(gate), static_cast<const T*>(up),
                                  static_cast<T*>(y), stride_gate, stride_up, M, N);
    });
  });
}

void glu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
             int64_t stride_gate, int64_t stride_up, int64_t stride_grad, int64_t M, int64_t N,
             int activation, DType dtype) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_form(activation, [&](auto form) {
      glu_backward<decltype(form)>(static_cast<const T*>(dy), static_cast<const T*>(gate),
                                   static_cast<const T*>(up), static_cast<T*>(dgate),
                                   static_cast<T*>(dup), stride_gate, stride_up, stride_grad, M, N);
    });
  });
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

REGISTER_KERNEL(gelu_fwd)
REGISTER_KERNEL(gelu_bwd)
REGISTER_KERNEL(bias_gelu_fwd)
REGISTER_KERNEL(bias_gelu_bwd)
REGISTER_KERNEL(glu_fwd)
REGISTER_KERNEL(glu_bwd)

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
void register_gelu(pybind11::module_& m) {
  gptfast::bind_kernel(m, "gelu_fwd", gptfast::kernel_gelu_fwd);
  gptfast::bind_kernel(m, "gelu_bwd", gptfast::kernel_gelu_bwd);
  gptfast::bind_kernel(m, "bias_gelu_fwd", gptfast::kernel_bias_gelu_fwd);
  gptfast::bind_kernel(m, "bias_gelu_bwd", gptfast::kernel_bias_gelu_bwd);
  gptfast::bind_kernel(m, "glu_fwd", gptfast::kernel_glu_fwd);
  gptfast::bind_kernel(m, "glu_bwd", gptfast::kernel_glu_bwd);
}
#endif
