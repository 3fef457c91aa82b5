// Instruction-set levels and the tables that choose between them at run time.
//
// Each csrc/cpu/<op>.cpp is compiled once per level. A kernel is declared with its signature,
//     DECLARE_KERNEL(gelu_fwd, void(const void* x, void* y, int64_t n, DType dtype));
// defined in namespace gptfast::GPTFAST_ISA, entered in its table with REGISTER_KERNEL(gelu_fwd)
// and called as kernel_gelu_fwd(...), which picks the entry of the current level.
#pragma once
#include "../common/dtype.h"

namespace gptfast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this processor, and compiled into this build
Isa current_isa();
void set_current_isa(Isa isa);

template <class Signature>
struct KernelTable;
template <class Result, class... Args>
struct KernelTable<Result(Args...)> {
  Result (*entry[kIsaCount])(Args...);
  Result operator()(Args... args) const { return entry[static_cast<int>(current_isa())](args...); }
};
template <class Signature>
struct KernelEntry {
  KernelEntry(KernelTable<Signature>& table, Isa isa, Signature* function) {
    table.entry[static_cast<int>(isa)] = function;
  }
};

#ifdef GPTFAST_ISA
// Calls body with a value of the storage type that `dtype` names.
template <class Body>
static inline void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::F32: return body(float{});
    case DType::BF16: return body(bf16{});
    case DType::F16: return body(f16{});
  }
}
#endif

}  // namespace gptfast

#ifdef GPTFAST_ISA
#define DECLARE_KERNEL(name, ...)                \
  namespace gptfast {                            \
  extern KernelTable<__VA_ARGS__> kernel_##name; \
  using signature_##name = __VA_ARGS__;          \
  }
#ifdef GPTFAST_BASELINE
#define DEFINE_TABLE(name) KernelTable<signature_##name> kernel_##name;
#else
#define DEFINE_TABLE(name)
#endif
#define REGISTER_KERNEL(name)                                                              \
  namespace gptfast {                                                                      \
  DEFINE_TABLE(name)                                                                       \
  static const KernelEntry<signature_##name> entry_##name(kernel_##name, Isa::GPTFAST_ISA, \
                                                          &GPTFAST_ISA::name);             \
  }
#endif
