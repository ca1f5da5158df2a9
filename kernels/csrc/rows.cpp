// Small row-wise work around attention and experts: norm and rotation of queries and keys, routing.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <nanobind/stl/optional.h>

#include "arrays.hpp"
#include "fixed_math.hpp"
#include "heads.hpp"
#include "kernel_table.hpp"

namespace edge {
namespace {

using Table = std::optional<Array<const float, 2>>;

void prepare_heads(Array<float, 2> x, Array<const std::int32_t, 1> positions, int heads, int head_dim, Table cos,
                   Table sin, std::optional<Array<const float, 1>> weight, float epsilon) {
  const auto rows = static_cast<std::int64_t>(x.shape(0)), width = static_cast<std::int64_t>(x.shape(1));
  require(heads > 0 && head_dim > 0 && width == static_cast<std::int64_t>(heads) * head_dim,
          "queries and keys must have shape [rows, heads * head_dim]");
  require(static_cast<std::int64_t>(positions.shape(0)) == rows, "positions must have one entry for each row");
  require(cos.has_value() == sin.has_value(), "rotary tables come in pairs: cos and sin");
  std::int64_t half = 0;
  if (cos) {
    half = static_cast<std::int64_t>(cos->shape(1));
    require(sin->shape(0) == cos->shape(0) && sin->shape(1) == cos->shape(1) && 2 * half <= head_dim,
            "rotary tables must have shape [max_positions, rotary / 2], rotary at most head_dim");
    for (std::int64_t r = 0; r < rows; ++r)
      require(positions.data()[r] >= 0 && positions.data()[r] < static_cast<std::int64_t>(cos->shape(0)),
              "a position lies outside the rotary tables");
  }
  std::int64_t group = 0;
  if (weight) {
    group = static_cast<std::int64_t>(weight->shape(0));
    require(group == head_dim || group == width, "norm weights must have head_dim or heads * head_dim entries");
  }
  const HeadsPreparation preparation{heads, head_dim, cos ? cos->data() : nullptr, sin ? sin->data() : nullptr, half,
                                     weight ? weight->data() : nullptr, group, epsilon};
  nb::gil_scoped_release released;
  for (std::int64_t r = 0; r < rows; ++r) prepare_row(preparation, x.data() + r * width, positions.data()[r]);
}

// Sums in float64 and in id order; gates rounded once at the end.
void route(Array<const float, 2> logits, bool normalize, bool softmax_after, Array<std::int32_t, 2> ids,
           Array<float, 2> gates) {
  const std::size_t rows = logits.shape(0), experts = logits.shape(1), top_k = ids.shape(1);
  require(top_k >= 1 && top_k <= experts, "top_k must be between 1 and the number of experts");
  require(ids.shape(0) == rows && gates.shape(0) == rows && gates.shape(1) == top_k,
          "ids and gates must have shape [rows, top_k]");
  std::vector<double> weights(experts);
  for (std::size_t r = 0; r < rows; ++r) {
    const float* l = logits.data() + r * experts;
    std::int32_t* id = ids.data() + r * top_k;
    float* gate = gates.data() + r * top_k;
    if (!std::all_of(l, l + experts, [](float x) { return std::isfinite(x); })) {
      // A broken row must show in its own result and leave its batch mates alone.
      for (std::size_t i = 0; i < top_k; ++i) id[i] = static_cast<std::int32_t>(i);
      std::fill(gate, gate + top_k, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    std::size_t found = 0;
    for (std::size_t e = 0; e < experts; ++e) {  // insertion: ties stay behind the lower id
      std::size_t place = found;
      while (place > 0 && l[e] > l[id[place - 1]]) --place;
      if (place >= top_k) continue;
      found = found < top_k ? found + 1 : found;
      for (std::size_t i = found - 1; i > place; --i) id[i] = id[i - 1];
      id[place] = static_cast<std::int32_t>(e);
    }
    double all = 0.0, chosen = 0.0;
    for (std::size_t e = 0; e < experts; ++e) {
      weights[e] = fixed_exp(static_cast<double>(l[e]) - static_cast<double>(l[id[0]]));
      all += weights[e];
    }
    for (std::size_t i = 0; i < top_k; ++i) chosen += weights[static_cast<std::size_t>(id[i])];
    const double total = normalize || softmax_after ? chosen : all;
    for (std::size_t i = 0; i < top_k; ++i)
      gate[i] = static_cast<float>(weights[static_cast<std::size_t>(id[i])] / total);
  }
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("prepare_heads", &prepare_heads, nb::arg("x"), nb::arg("positions"), nb::arg("heads"), nb::arg("head_dim"),
        nb::arg("cos").none(), nb::arg("sin").none(), nb::arg("weight").none(), nb::arg("epsilon"));
  m.def("route", &route);
}

}  // namespace edge
