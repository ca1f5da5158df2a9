#include <stdexcept>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.hpp"
#include "isa.hpp"

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of edge-runtime.";
  m.def("isa", [] { return std::string(edge::kernels().name); });
  m.def("available_isas", &edge::available_isas);
  m.def("set_isa", &edge::set_isa);
  edge::bind_arriving(m);
  edge::bind_attention(m);
  edge::bind_chain(m);
  edge::bind_expert_slots(m);
  edge::bind_experts(m);
  edge::bind_flash(m);
  edge::bind_flash_layer(m);
  edge::bind_inlet(m);
  edge::bind_program(m);
  edge::bind_rows(m);
  edge::bind_sampling(m);
}
