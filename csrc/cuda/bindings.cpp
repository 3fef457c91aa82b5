// The launchers of the CUDA kernels as gptfast._C.cuda, or as a module of their own for the host
// runner. Arguments are those of launchers.h behind the index of a device: pointers as integers, the
// stream too.
#include <pybind11/pybind11.h>

#include "../common/bind.h"
#include "launchers.h"

#ifdef GPTFAST_CUDA_ON_CPU
namespace cuda_on_cpu {
extern uint64_t seed;
}
#else
#include <cuda_runtime_api.h>
#endif

namespace gptfast {
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
    if (status != cudaSuccess)
      throw std::runtime_error(std::string("gptfast: CUDA: ") + cudaGetErrorString(status));
  }
  int before_ = 0;
};
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
  BIND(cross_entropy_bwd);
  BIND(cross_entropy_fwd);
  BIND(gelu_bwd);
  BIND(gelu_fwd);
  BIND(layer_norm_bwd);
  BIND(layer_norm_fwd);
#undef BIND
}

#ifdef GPTFAST_CUDA_ON_CPU
PYBIND11_MODULE(cuda_on_cpu, m) {
  register_cuda(m);
  m.def("set_seed", [](uint64_t seed) { cuda_on_cpu::seed = seed; });
}
#endif
