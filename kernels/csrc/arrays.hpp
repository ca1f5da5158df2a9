// Array types of the Python boundary, and the one way to refuse.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

namespace edge {

namespace nb = nanobind;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

inline void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

void bind_arriving(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_chain(nb::module_& m);
void bind_expert_slots(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_flash(nb::module_& m);
void bind_flash_layer(nb::module_& m);
void bind_inlet(nb::module_& m);
void bind_program(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_sampling(nb::module_& m);

}  // namespace edge
