// The Python module gptfast._C: one register_<op>(m) per op, and what is known of this build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

void register_adamw(py::module_& m);
void register_attention(py::module_& m);
void register_attention_decode(py::module_& m);
void register_ceiling_probe(py::module_& m);
void register_cross_entropy(py::module_& m);
void register_decode_step(py::module_& m);
void register_dropout_add(py::module_& m);
void register_embedding(py::module_& m);
void register_gelu(py::module_& m);
void register_layer_norm(py::module_& m);
void register_linear_decode(py::module_& m);
void register_linear_cross_entropy(py::module_& m);
void register_linear_gelu(py::module_& m);
void register_rope(py::module_& m);
void register_sampling(py::module_& m);
void register_simd_probe(py::module_& m);
#ifdef GPTFAST_CUDA
void register_cuda(py::module_& m);
#endif

static std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < gptfast::kIsaCount; ++i)
    if (gptfast::isa_supported(static_cast<gptfast::Isa>(i)))
      names.push_back(gptfast::isa_name(static_cast<gptfast::Isa>(i)));
  return names;
}

static void set_cpu_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i < gptfast::kIsaCount; ++i) {
    const auto isa = static_cast<gptfast::Isa>(i);
    if (!gptfast::isa_supported(isa)) continue;
    if (name == gptfast::isa_name(isa)) return gptfast::set_current_isa(isa);
    known += std::string(known.empty() ? "" : ", ") + gptfast::isa_name(isa);
  }
  throw std::invalid_argument("CPU instruction set must be one of " + known +
                              " on this processor, got '" + name + "'");
}

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets of this processor that this build has code for.");
  m.def("cpu_isa", [] { return gptfast::isa_name(gptfast::current_isa()); });
  m.def("set_cpu_isa", &set_cpu_isa);
  m.def("num_threads", [] { return omp_get_max_threads(); });
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = GPTFAST_COMPILER;
    info["cuda"] = GPTFAST_CUDA_BUILD;
    info["cuda_archs"] = GPTFAST_CUDA_ARCHS;
    info["cpu_isas"] = GPTFAST_CPU_ISAS;
    return info;
  });
  register_adamw(m);
  register_attention(m);
  register_attention_decode(m);
  register_ceiling_probe(m);
  register_cross_entropy(m);
  register_decode_step(m);
  register_dropout_add(m);
  register_embedding(m);
  register_gelu(m);
  register_layer_norm(m);
  register_linear_decode(m);
  register_linear_cross_entropy(m);
  register_linear_gelu(m);
  register_rope(m);
  register_sampling(m);
  register_simd_probe(m);
#ifdef GPTFAST_CUDA
  auto cuda = m.def_submodule("cuda", "The launchers of csrc/cuda/launchers.h.");
  register_cuda(cuda);
#endif
}
