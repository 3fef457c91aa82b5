// Exposes a kernel table to Python: pointers arrive as integers (Tensor.data_ptr()), dtypes as
// their codes, and the GIL is released while the kernel runs. Python has checked every argument.
#pragma once
#include <pybind11/pybind11.h>

#include "../cpu/isa.h"
#include "dtype.h"

namespace gptfast {

template <class T>
struct FromPython {
  using type = T;
  static T get(T value) { return value; }
};
template <class T>
struct FromPython<T*> {
  using type = uintptr_t;
  static T* get(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct FromPython<DType> {
  using type = int;
  static DType get(int code) { return static_cast<DType>(code); }
};

template <class Result, class... Args>
void bind_kernel(pybind11::module_& m, const char* name,
                 const KernelTable<Result(Args...)>& table) {
  m.def(
      name,
      [&table](typename FromPython<Args>::type... args) {
        return table(FromPython<Args>::get(args)...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace gptfast
