// Runs chosen experts from the bytes of a slice.
#include <nanobind/stl/string.h>

#include "experts_run.hpp"

namespace edge {
using namespace expert_layer;

namespace {

void run_experts(Array<const float, 2> x, Array<const std::int32_t, 2> ids, Array<const float, 2> gates,
                 Array<const std::uint8_t, 1> buffer, const std::string& format, std::int64_t experts,
                 std::int64_t hidden, std::int64_t intermediate, std::int64_t stride_bytes,
                 Array<const std::int64_t, 1> offsets, Array<float, 2> y, int threads) {
  const Layer layer = checked_layer(buffer, format, experts, hidden, intermediate, stride_bytes, offsets);
  check_rows(layer, x, ids, gates, y);
  const auto rows = static_cast<std::int64_t>(x.shape(0)), top_k = static_cast<std::int64_t>(ids.shape(1));
  nb::gil_scoped_release released;
  const std::int64_t step = std::max<std::int64_t>(1, kScratchFloats / (std::max<std::int64_t>(1, top_k) * (hidden + intermediate)));
  for (std::int64_t r = 0; r < rows; r += step) {
    const std::int64_t count = std::min(step, rows - r);
    Run(layer, x.data() + r * hidden, ids.data() + r * top_k, gates.data() + r * top_k, y.data() + r * hidden, count,
        top_k)(threads);
  }
}

// The last phase of `run_experts` alone, for outputs that were computed apart: the same operations in the same order.
void combine_experts(Array<const float, 2> outputs, Array<const float, 2> gates, Array<float, 2> y) {
  const auto rows = static_cast<std::int64_t>(gates.shape(0)), top_k = static_cast<std::int64_t>(gates.shape(1));
  const auto hidden = static_cast<std::int64_t>(y.shape(1));
  require(static_cast<std::int64_t>(y.shape(0)) == rows, "the result must have a row for each row of gates");
  require(static_cast<std::int64_t>(outputs.shape(0)) == rows * top_k && outputs.shape(1) == y.shape(1),
          "outputs must have a row for each gate, of the result's width");
  require(hidden < (1 << 28), "rows are impossibly wide");
  nb::gil_scoped_release released;
  const KernelTable& k = kernels();
  for (std::int64_t row = 0; row < rows; ++row) {
    float* sum = y.data() + row * hidden;
    std::fill(sum, sum + hidden, 0.0f);
    for (std::int64_t slot = row * top_k; slot < (row + 1) * top_k; ++slot)
      k.accumulate(sum, outputs.data() + slot * hidden, gates.data()[slot], static_cast<int>(hidden));
  }
}

}  // namespace

void bind_experts(nb::module_& m) {
  m.def("run_experts", &run_experts);
  m.def("combine_experts", &combine_experts);
}

}  // namespace edge
