// The launchers of the CUDA kernels as gptfast._C.cuda, or as a module of their own for the host
// runner. Arguments are those of launchers.h behind the index of a device: pointers as integers, the
// stream too.
#include <pybind11/pybind11.h>

#include "../common/bind.h"
#include "launchers.h"

#ifdef GPTFAST_CUDA_ON_CPU
namespace cuda_on_cpu {
extern uint64_t seed;
extern int64_t launches;
}  // namespace cuda_on_cpu
#else
#include <cuda_runtime_api.h>
#endif

namespace gptfast {

template <>
struct FromPython<cuda::Heads> {
  using type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  static cuda::Heads get(const type& t) {
    const auto [address, stride_b, stride_h, stride_t] = t;
    return {reinterpret_cast<void*>(address), stride_b, stride_h, stride_t};
  }
};
template <>
struct FromPython<cuda::Rows> {
  using type = std::tuple<uintptr_t, int64_t, int64_t>;
  static cuda::Rows get(const type& t) {
    const auto [address, stride_b, stride_h] = t;
    return {reinterpret_cast<float*>(address), stride_b, stride_h};
  }
};
template <>
struct FromPython<cuda::NewTokens> {
  using HeadsTuple = FromPython<cuda::Heads>::type;
  using type = std::tuple<HeadsTuple, HeadsTuple, uintptr_t, uintptr_t, int64_t, int, bool>;
  static cuda::NewTokens get(const type& t) {
    const auto [k, v, cos, sin, stride_b, half, interleaved] = t;
    return {FromPython<cuda::Heads>::get(k),
            FromPython<cuda::Heads>::get(v),
            reinterpret_cast<const float*>(cos),
            reinterpret_cast<const float*>(sin),
            stride_b,
            half,
            interleaved};
  }
};
template <>
struct FromPython<cuda::Slopes> {
  using type = std::tuple<uintptr_t, int64_t>;
  static cuda::Slopes get(const type& t) {
    return {reinterpret_cast<const float*>(std::get<0>(t)), std::get<1>(t)};
  }
};

namespace {

#ifdef GPTFAST_CUDA_ON_CPU
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
// Makes a device current while a launcher runs. It is set even where it seems to be current: the
// runtime linked into this module is another than PyTorch's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::string what = std::string("gptfast: CUDA: ") + cudaGetErrorString(status);
    if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice)
      what += ". Without a GPU and its driver no kernel can run; `gptfast doctor` tells more";
    throw std::runtime_error(what);
  }
  int before_ = 0;
};
#endif

#ifndef GPTFAST_CUDA_ON_CPU
// CUDA versions, 13000 for 13.0: the newest that the driver knows, 0 without one, and ours.
pybind11::tuple versions() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return pybind11::make_tuple(driver, runtime);
}
#endif

template <class... Args>
void bind_launcher(pybind11::module_& m, const char* name, void (*launcher)(Args...)) {
  m.def(
      name,
      [launcher](int device, typename FromPython<Args>::type... args) {
        const DeviceGuard guard(device);
        launcher(FromPython<Args>::get(args)...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace
}  // namespace gptfast

void register_cuda(pybind11::module_& m) {
#define BIND(name) gptfast::bind_launcher(m, #name, gptfast::cuda::name)
  BIND(adamw);
  BIND(attention_decode_fwd);
  BIND(attention_fwd);
  BIND(bias_gelu_bwd);
  BIND(bias_gelu_fwd);
  BIND(cross_entropy_bwd);
  BIND(cross_entropy_fused);
  BIND(cross_entropy_fwd);
  BIND(gelu_bwd);
  BIND(gelu_fwd);
  BIND(glu_bwd);
  BIND(glu_fwd);
  BIND(layer_norm_bwd);
  BIND(layer_norm_fwd);
  BIND(linear_decode_fwd);
  BIND(sample);
#undef BIND
#ifndef GPTFAST_CUDA_ON_CPU
  m.def("versions", &gptfast::versions);
#endif
}

#ifdef GPTFAST_CUDA_ON_CPU
#ifdef GPTFAST_COUNTS
void register_traffic(pybind11::module_& m);
#endif
PYBIND11_MODULE(cuda_on_cpu, m) {
  register_cuda(m);
  m.def("set_seed", [](uint64_t seed) { cuda_on_cpu::seed = seed; });
  m.def("launches", [] { return cuda_on_cpu::launches; });
#ifdef GPTFAST_COUNTS
  register_traffic(m);
#endif
}
#endif
