// Heads of queries, keys and values: (B, H, T, D) with contiguous D and any other strides.
#pragma once
#include <cstdint>

namespace gptfast {

struct Heads {
  uintptr_t address;
  int64_t stride_b, stride_h, stride_t;  // in elements
};

}  // namespace gptfast

namespace gptfast::GPTFAST_ISA {
namespace {

template <class T>
T* row(Heads x, int64_t b, int64_t h, int64_t t) {
  return reinterpret_cast<T*>(x.address) + b * x.stride_b + h * x.stride_h + t * x.stride_t;
}

}  // namespace
}  // namespace gptfast::GPTFAST_ISA

#ifdef GPTFAST_BASELINE
#include "../common/bind.h"
namespace gptfast {
template <>
struct FromPython<Heads> {
  using type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  static Heads get(type t) {
    return std::apply([](auto... field) { return Heads{field...}; }, t);
  }
};
}  // namespace gptfast
#endif
