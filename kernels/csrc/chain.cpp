#include "chain.hpp"

#include <algorithm>
#include <limits>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "chain_step.hpp"
#include "scratch.hpp"

namespace edge {

Chain::Chain(std::vector<std::int64_t> widths, int result)
    : widths_(std::move(widths)),
      is_written_(widths_.size(), false),
      result_(result),
      most_positions_(std::numeric_limits<std::int64_t>::max()) {
  require(result > 0 && static_cast<std::size_t>(result) < widths_.size(), "a chain's result is none of its values");
  for (const std::int64_t width : widths_) require(width >= 1 && width < (1 << 28), "a value has an impossible width");
  is_written_[0] = true;
}

std::int64_t Chain::checked(int value, bool is_written) {
  require(value >= 0 && static_cast<std::size_t>(value) < widths_.size(), "a chain has no such value");
  const auto index = static_cast<std::size_t>(value);
  require(is_written ? value > 0 : is_written_[index],
          "a chain does not change what comes in, and reads only what was written");
  if (is_written) is_written_[index] = true;
  return widths_[index];
}

void Chain::program(Program& program, std::vector<int> inputs, std::vector<int> outputs) {
  program.prepare();
  require(inputs.size() == program.inputs() && outputs.size() == program.outputs(), "a program has other inputs and outputs");
  for (std::size_t i = 0; i < inputs.size(); ++i)
    require(checked(inputs[i], false) == program.width(i), "a value does not fit a program's input");
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    require(std::find(inputs.begin(), inputs.end(), outputs[i]) == inputs.end(), "a program does not change its inputs");
    require(checked(outputs[i], true) == program.width(inputs.size() + i), "a value does not fit a program's output");
  }
  inputs.insert(inputs.end(), outputs.begin(), outputs.end());
  parts_.push_back({&program, std::move(inputs), {}});
}

HeadsPreparation Chain::heads(int count, int head_dim, const Table& cos, const Table& sin, const Vector& weight, float epsilon) {
  HeadsPreparation p{count, head_dim, nullptr, nullptr, 0, nullptr, 0, epsilon};
  require(cos.has_value() == sin.has_value(), "rotary tables come in pairs: cos and sin");
  if (cos) {
    p.half = static_cast<std::int64_t>(cos->shape(1));
    require(sin->shape(0) == cos->shape(0) && sin->shape(1) == cos->shape(1) && 2 * p.half <= head_dim,
            "rotary tables must have shape [max_positions, rotary / 2], rotary at most head_dim");
    most_positions_ = std::min(most_positions_, static_cast<std::int64_t>(cos->shape(0)));
    p.cos = cos->data();
    p.sin = sin->data();
    tables_.push_back(cos);
    tables_.push_back(sin);
  }
  if (weight) {
    p.group = static_cast<std::int64_t>(weight->shape(0));
    require(p.group == head_dim || p.group == static_cast<std::int64_t>(count) * head_dim,
            "norm weights must have head_dim or heads * head_dim entries");
    p.weight = weight->data();
    vectors_.push_back(weight);
  }
  return p;
}

void Chain::attention(std::vector<int> values, int layer, int heads, int kv_heads, int head_dim, float scale, int window,
                      float softcap, bool causal, Table cos, Table sin, Vector q_norm, Vector k_norm, float epsilon) {
  require(values.size() == 4, "attention takes queries, keys and values, and makes one value");
  require(kv_heads >= 1 && heads >= kv_heads && heads % kv_heads == 0,
          "query heads must be a multiple of the key/value heads");
  require(head_dim >= 1 && head_dim <= kMaxHeadDim && window >= 0, "attention of an impossible shape");
  const std::int64_t q_width = static_cast<std::int64_t>(heads) * head_dim, k_width = static_cast<std::int64_t>(kv_heads) * head_dim;
  require(checked(values[0], false) == q_width && checked(values[1], false) == k_width && checked(values[2], false) == k_width,
          "queries, keys and values are heads * head_dim wide");
  require(checked(values[3], true) == q_width && std::count(values.begin(), values.end(), values[3]) == 1,
          "attention makes a value of its own, as wide as the queries");
  prepared_width_ = std::max(prepared_width_, q_width + k_width);
  parts_.push_back({nullptr, std::move(values),
                    {layer, {heads, kv_heads, head_dim, scale, window, softcap, causal},
                     this->heads(heads, head_dim, cos, sin, q_norm, epsilon),
                     this->heads(kv_heads, head_dim, cos, sin, k_norm, epsilon)}});
}

template <typename Element>
void Chain::run(Array<const float, 2> x, Array<float, 2> out, Array<Element, 6> pool,
                Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
                Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths, int threads) {
  const Batch batch = checked_batch(positions, sequence, tables, lengths);
  require(is_written_[static_cast<std::size_t>(result_)], "a chain's result is never made");
  require(batch.rows >= 1 && batch.rows <= kChunkRows, "a chain takes 1 to 128 rows");
  for (std::int64_t r = 0; r < batch.rows; ++r)
    require(batch.positions[r] < most_positions_, "a position lies outside the rotary tables");
  require(static_cast<std::int64_t>(x.shape(0)) == batch.rows && static_cast<std::int64_t>(x.shape(1)) == widths_[0],
          "rows that come in have another shape than the chain's");
  require(static_cast<std::int64_t>(out.shape(0)) == batch.rows &&
              static_cast<std::int64_t>(out.shape(1)) == widths_[static_cast<std::size_t>(result_)],
          "rows that go out have another shape than the chain's");
  const KvPool kv = checked_pool(pool, 0);
  check_pages(batch, kv);
  std::int64_t most_bytes = 0;
  for (const Part& part : parts_) {
    if (part.program) {
      most_bytes = std::max(most_bytes, part.program->weight_bytes());
      continue;
    }
    require(part.attention.layer >= 0 && part.attention.layer < kv.layers, "the pool has no such layer");
    require(part.attention.shape.kv_heads == kv.kv_heads && part.attention.shape.head_dim == kv.head_dim,
            "the pool holds keys and values of another shape");
  }
  const int used = threads_worth(threads, most_bytes * (batch.rows + 7) / 8, kThreadShare);
  Step<Element> step(*this, batch, kv, pool.data(), used);
  const Scratch scratch(step.scratch_floats());
  step.place(x.data(), out.data(), scratch.data());
  nb::gil_scoped_release released;
  step.run();
}

void bind_chain(nb::module_& m) {
  nb::class_<Chain>(m, "Chain")
      .def(nb::init<std::vector<std::int64_t>, int>())
      .def("program", &Chain::program, nb::keep_alive<1, 2>())
      .def("attention", &Chain::attention, nb::arg("values"), nb::arg("layer"), nb::arg("heads"), nb::arg("kv_heads"),
           nb::arg("head_dim"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"), nb::arg("causal"),
           nb::arg("cos").none(), nb::arg("sin").none(), nb::arg("q_norm").none(), nb::arg("k_norm").none(),
           nb::arg("epsilon"))
      .def("run", &Chain::run<float>)
      .def("run_codes", &Chain::run<std::int8_t>);
}

}  // namespace edge
