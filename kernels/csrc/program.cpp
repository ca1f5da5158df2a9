#include <algorithm>
#include <optional>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "program.hpp"

#include "program_chunk.hpp"
#include "scratch.hpp"

namespace edge {
namespace {

struct KindName {
  const char* name;
  RowKind kind;
  bool is_binary;
};
constexpr KindName kKinds[] = {
    {"rms_norm", RowKind::rms_norm, false}, {"layer_norm", RowKind::layer_norm, false}, {"add", RowKind::add, true},
    {"mul", RowKind::mul, true},            {"silu_mul", RowKind::silu_mul, true},      {"silu", RowKind::silu, false},
    {"gelu", RowKind::gelu, false},         {"gelu_tanh", RowKind::gelu_tanh, false},   {"tanh", RowKind::tanh, false},
    {"scale", RowKind::scale, false},       {"softcap", RowKind::softcap, false},
};

}  // namespace

Program::Program(std::vector<std::int64_t> input_widths, std::vector<std::int64_t> output_widths)
    : inputs_(input_widths.size()), outputs_(output_widths.size()) {
  for (const std::int64_t width : input_widths) slot(width);
  for (const std::int64_t width : output_widths) slot(width);
}

int Program::slot(std::int64_t width) {
  require(width >= 1 && width < (1 << 28), "a value has an impossible width");
  slots_.push_back({width, 32, width});
  return static_cast<int>(slots_.size()) - 1;
}

int Program::quantized(std::int64_t columns, int bits) {
  require(bits == 4 || bits == 8, "rows are quantized for weights of 4 or 8 bits");
  const int index = slot(columns);
  slots_.back() = {(columns + kBlock - 1) / kBlock * 10, bits, columns};  // codes, a correction and a scale
  return index;
}

Program::Slot& Program::checked(int index, bool is_quantized, bool is_written) {
  require(index >= 0 && static_cast<std::size_t>(index) < slots_.size(), "a program has no such value");
  Slot& slot = slots_[static_cast<std::size_t>(index)];
  require((slot.bits != 32) == is_quantized, "a value is quantized where it must not be, or the other way round");
  require(!is_written || static_cast<std::size_t>(index) >= inputs_, "a program does not change its inputs");
  require(is_written || slot.first >= 0 || static_cast<std::size_t>(index) < inputs_, "a value is read before it is made");
  return slot;
}

void Program::touch(int index, int phase) {
  Slot& slot = slots_[static_cast<std::size_t>(index)];
  if (slot.first < 0) slot.first = phase;
  slot.last = phase;
  scratch_width_ = -1;
}

const float* Program::keep(const std::optional<Array<const float, 1>>& vector, std::int64_t width) {
  if (!vector) return nullptr;
  require(static_cast<std::int64_t>(vector->shape(0)) == width, "a weight has another width than the value");
  vectors_.push_back(*vector);
  return vector->data();
}

void Program::row(const std::string& kind, int a, int b, int out, std::optional<Array<const float, 1>> weight,
                  std::optional<Array<const float, 1>> bias, float parameter) {
  const auto* found = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const KindName& k) { return kind == k.name; });
  require(found != std::end(kKinds), "unknown operation on rows: " + kind);
  const bool is_norm = found->kind == RowKind::rms_norm || found->kind == RowKind::layer_norm;
  require(is_norm == weight.has_value() && (is_norm || !bias), "norms have a weight, and nothing else has");
  require(found->is_binary == (b >= 0), kind + " has another number of inputs");
  const std::int64_t width = checked(a, false, false).width;
  require(checked(out, false, true).width == width && (b < 0 || checked(b, false, false).width == width),
          "the values of an operation have one width");
  if (phases_.empty() || phases_.back().rows.empty()) phases_.emplace_back();
  const int phase = static_cast<int>(phases_.size()) - 1;
  const RowOperation operation{found->kind, static_cast<int>(width), parameter, keep(weight, width), keep(bias, width)};
  phases_.back().rows.push_back({operation, a, b, out, false});
  for (const int index : {a, b, out})
    if (index >= 0) touch(index, phase);
}

void Program::quantize(int in, int out) {
  require(checked(in, false, false).width == checked(out, true, true).columns, "the values of an operation have one width");
  if (phases_.empty() || phases_.back().rows.empty()) phases_.emplace_back();
  phases_.back().rows.push_back({{}, in, -1, out, true});
  touch(in, static_cast<int>(phases_.size()) - 1);
  touch(out, static_cast<int>(phases_.size()) - 1);
}

void Program::linear(const PackedMatrix& matrix, int in, int out, std::optional<Array<const float, 1>> bias) {
  const Slot& from = checked(in, matrix.bits() != 32, false);
  require(from.columns == matrix.columns() && from.bits == matrix.bits() && checked(out, false, true).width == matrix.outputs(),
          "a matrix does not fit its values");
  const auto is_made_now = [&] {
    const std::vector<LinearStep>& now = phases_.back().linears;
    return std::any_of(now.begin(), now.end(), [&](const LinearStep& step) { return step.out == in || step.out == out; });
  };
  if (phases_.empty() || phases_.back().linears.empty() || is_made_now()) phases_.emplace_back();
  Phase& phase = phases_.back();
  phase.linears.push_back({&matrix, in, out, keep(bias, matrix.outputs()), phase.items});
  phase.items += (matrix.tiles() + kGroupTiles - 1) / kGroupTiles;
  phase.weight_bytes += matrix.bytes();
  touch(in, static_cast<int>(phases_.size()) - 1);
  touch(out, static_cast<int>(phases_.size()) - 1);
}

// Slots whose phases overlap lie apart, the widest first.
void Program::place() {
  std::vector<std::size_t> order;
  for (std::size_t i = inputs_ + outputs_; i < slots_.size(); ++i)
    if (slots_[i].first >= 0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t x, std::size_t y) { return slots_[x].width > slots_[y].width; });
  scratch_width_ = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    Slot& slot = slots_[order[i]];
    slot.offset = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t j = 0; j < i; ++j) {
        const Slot& other = slots_[order[j]];
        const bool is_beside = other.last < slot.first || slot.last < other.first ||
                               other.offset + other.width <= slot.offset || slot.offset + slot.width <= other.offset;
        if (is_beside) continue;
        slot.offset = other.offset + other.width;
        moved = true;
      }
    }
    scratch_width_ = std::max(scratch_width_, slot.offset + slot.width);
  }
}

void Program::prepare() {
  for (std::size_t i = inputs_; i < inputs_ + outputs_; ++i) require(slots_[i].first >= 0, "an output is never made");
  if (scratch_width_ < 0) place();
}

std::int64_t Program::weight_bytes() const {
  std::int64_t total = 0;
  for (const Phase& phase : phases_) total += phase.weight_bytes;
  return total;
}

void Program::run(const std::vector<Array<const float, 2>>& inputs, const std::vector<Array<float, 2>>& outputs, int threads) {
  require(inputs.size() == inputs_ && outputs.size() == outputs_ && inputs_ > 0, "a program has other inputs and outputs");
  prepare();
  const auto rows = static_cast<std::int64_t>(inputs[0].shape(0));
  for (std::size_t i = 0; i < inputs_ + outputs_; ++i) {
    const auto found_rows = i < inputs_ ? inputs[i].shape(0) : outputs[i - inputs_].shape(0);
    const auto width = i < inputs_ ? inputs[i].shape(1) : outputs[i - inputs_].shape(1);
    require(static_cast<std::int64_t>(found_rows) == rows && static_cast<std::int64_t>(width) == slots_[i].width,
            "the inputs and outputs of a program have shape [rows, width], and one number of rows");
  }
  if (rows == 0) return;
  const std::int64_t weight_bytes = this->weight_bytes();
  nb::gil_scoped_release released;
  const std::int64_t step = std::min(rows, kChunkRows);
  const Scratch scratch(static_cast<std::size_t>(std::max<std::int64_t>(1, scratch_width_ * step)));
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    Chunk chunk(*this, scratch.data(), count);
    for (std::size_t i = 0; i < inputs_; ++i)
      chunk.set(static_cast<int>(i), const_cast<float*>(inputs[i].data()) + first * slots_[i].width);
    for (std::size_t i = inputs_; i < inputs_ + outputs_; ++i)
      chunk.set(static_cast<int>(i), outputs[i - inputs_].data() + first * slots_[i].width);
    chunk.run(threads_worth(threads, weight_bytes * (count + 7) / 8, kThreadShare));
  }
}

void bind_program(nb::module_& m) {
  nb::class_<PackedMatrix>(m, "PackedMatrix")
      .def(nb::init<Array<const std::uint8_t, 3>, Array<const float, 2>, std::int64_t, int>())
      .def(nb::init<Array<const float, 2>, int>())
      .def_prop_ro("outputs", &PackedMatrix::outputs)
      .def_prop_ro("columns", &PackedMatrix::columns)
      .def_prop_ro("bits", &PackedMatrix::bits)
      .def_prop_ro("bytes", &PackedMatrix::bytes);
  nb::class_<Program>(m, "Program")
      .def(nb::init<std::vector<std::int64_t>, std::vector<std::int64_t>>())
      .def("slot", &Program::slot)
      .def("quantized", &Program::quantized)
      .def("row", &Program::row, nb::arg("kind"), nb::arg("a"), nb::arg("b"), nb::arg("out"), nb::arg("weight").none(),
           nb::arg("bias").none(), nb::arg("parameter"))
      .def("quantize", &Program::quantize)
      .def("linear", &Program::linear, nb::arg("matrix"), nb::arg("input"), nb::arg("out"), nb::arg("bias").none(),
           nb::keep_alive<1, 2>())
      .def("run", &Program::run);
}

}  // namespace edge
