// Experts of one layer over some rows: rows are grouped by expert, so that a batch reads an expert's weights once.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace edge::expert_layer {

constexpr int kChunk = 128;                            // weight rows of one item of work: a multiple of a block
constexpr int kGroupRows = 64;                         // activation rows that go through a chunk together
constexpr std::int64_t kThreadShare = 1 << 19;         // weight bytes a thread must read to be worth starting
constexpr std::int64_t kScratchFloats = 16 << 20;      // bounds the scratch of a large batch

enum class Format { fp32, int8, int4, nested2, nested4, nested8 };  // nested: edge_kernels/nested.py

struct Layer {
  const std::uint8_t* base;
  Format format;
  std::int64_t experts, hidden, intermediate, stride_bytes;
  std::int64_t data[3], scales[3], low[3], fine[3];  // byte offsets of gate, up, down
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline bool is_nested(Format format) {
  return format == Format::nested2 || format == Format::nested4 || format == Format::nested8;
}

inline std::int64_t groups_of(std::int64_t columns) { return ceil_div(columns, 4 * kBlock); }

// Of one of the first planes where the weights are nested.
inline std::int64_t row_bytes(Format format, std::int64_t columns) {
  if (format == Format::fp32) return columns * 4;
  if (is_nested(format)) return groups_of(columns) * kBlock;
  return ceil_div(columns, kBlock) * (format == Format::int8 ? 32 : 16);
}

inline std::int64_t row_fine_bytes(std::int64_t columns) { return groups_of(columns) * 2 * kBlock; }

inline std::int64_t row_scale_bytes(Format format, std::int64_t columns) {
  return is_nested(format) ? groups_of(columns) * 8 : ceil_div(columns, kBlock) * 4;
}

// Quantized rows of one width, zeroed so that blocks past the last add nothing.
class QuantizedRows {
 public:
  QuantizedRows(Format format, std::int64_t rows, std::int64_t columns)
      : group_blocks_(format == Format::int8 ? 2 : 4),
        groups_(ceil_div(ceil_div(columns, kBlock), group_blocks_)),
        code_bytes_(groups_ * (is_nested(format) ? kNestedGroupBytes : format == Format::int8 ? 64 : 128)),
        codes_(static_cast<std::size_t>(rows * code_bytes_)) {
    if (is_nested(format)) return;
    corrections_.resize(static_cast<std::size_t>(rows * groups_ * 16));
    scales_.resize(static_cast<std::size_t>(rows * groups_ * group_blocks_));
  }

  QuantizedRow row(std::int64_t r) const {
    if (scales_.empty()) return {codes_.data() + r * code_bytes_, nullptr, nullptr};
    return {codes_.data() + r * code_bytes_, corrections_.data() + r * groups_ * 16,
            scales_.data() + r * groups_ * group_blocks_};
  }
  QuantizedRowOut out(std::int64_t r) {
    if (scales_.empty()) return {codes_.data() + r * code_bytes_, nullptr, nullptr};
    return {codes_.data() + r * code_bytes_, corrections_.data() + r * groups_ * 16,
            scales_.data() + r * groups_ * group_blocks_};
  }

 private:
  std::int64_t group_blocks_, groups_, code_bytes_;
  std::vector<std::int8_t> codes_;
  std::vector<std::int32_t> corrections_;
  std::vector<float> scales_;
};

// Rows of some columns in the form the weights want: float32, or quantized.
class Activations {
 public:
  Activations(Format format, std::int64_t rows, std::int64_t columns)
      : format_(format), columns_(static_cast<int>(columns)), quantized_(format, format == Format::fp32 ? 0 : rows, columns) {}

  void set(const KernelTable& k, std::int64_t row, const float* x, std::int64_t first, std::int64_t last) {
    if (format_ == Format::fp32) return;
    const int from = static_cast<int>(first / kBlock), to = static_cast<int>(ceil_div(last, kBlock));
    const auto quantize = format_ == Format::int8      ? k.quantize_int8
                          : format_ == Format::nested2 ? k.quantize_nested2
                          : format_ == Format::nested4 ? k.quantize_nested4
                          : format_ == Format::nested8 ? k.quantize_nested8
                                                       : k.quantize_int4;
    quantize(x, columns_, from, to, quantized_.out(row));
  }
  QuantizedRow quantized(std::int64_t row) const { return quantized_.row(row); }

 private:
  Format format_;
  int columns_;
  QuantizedRows quantized_;
};

struct Group {
  std::int64_t expert;
  std::vector<std::int64_t> slots;  // row * top_k + rank
};

inline std::vector<Group> group_by_expert(const std::int32_t* ids, std::int64_t slots, std::int64_t experts) {
  std::vector<std::int64_t> where(static_cast<std::size_t>(experts), -1);
  std::vector<Group> groups;
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    std::int64_t& index = where[static_cast<std::size_t>(ids[slot])];
    if (index < 0) {
      index = static_cast<std::int64_t>(groups.size());
      groups.push_back({ids[slot], {}});
    }
    groups[static_cast<std::size_t>(index)].slots.push_back(slot);
  }
  return groups;
}

class Run {
 public:
  Run(const Layer& layer, const float* x, const std::int32_t* ids, const float* gates, float* y, std::int64_t rows,
      std::int64_t top_k)
      : k_(kernels()), layer_(layer), x_(x), gates_(gates), y_(y), rows_(rows), top_k_(top_k),
        groups_(group_by_expert(ids, rows * top_k, layer.experts)), inputs_(layer.format, rows, layer.hidden),
        inner_(layer.format, rows * top_k, layer.intermediate),
        inner_floats_(new float[static_cast<std::size_t>(rows * top_k * layer.intermediate)]),
        outputs_(new float[static_cast<std::size_t>(rows * top_k * layer.hidden)]) {}

  // All of them here: everything in four phases.
  void operator()(int threads) const {
    const auto groups = static_cast<std::int64_t>(groups_.size());
    const std::int64_t expert_bytes = 2 * layer_.intermediate * row_bytes(layer_.format, layer_.hidden) +
                                      layer_.hidden * row_bytes(layer_.format, layer_.intermediate);
    const std::int64_t work = expert_bytes * (groups + rows_ * top_k_ / 4);
    const std::int64_t inner_chunks = this->inner_chunks(), outer_chunks = this->outer_chunks();
    run_phases(threads_worth(threads, work, kThreadShare),
               {rows_, groups * inner_chunks, groups * outer_chunks, rows_},
               [&](int phase, std::int64_t item, int) {
                 if (phase == 0) prepare(item);
                 if (phase == 1) gate_and_up(group(item / inner_chunks), item % inner_chunks * kChunk);
                 if (phase == 2) down(group(item / outer_chunks), item % outer_chunks * kChunk);
                 if (phase == 3) combine(item);
               });
  }

  // The same step by step: all rows prepared, then of each group all chunks of the first product, then all of the second;
  // rows are combined when all groups are done.
  const std::vector<Group>& groups() const { return groups_; }
  const Group& group(std::int64_t index) const { return groups_[static_cast<std::size_t>(index)]; }
  std::int64_t inner_chunks() const { return ceil_div(layer_.intermediate, kChunk); }
  std::int64_t outer_chunks() const { return ceil_div(layer_.hidden, kChunk); }

  void prepare(std::int64_t row) const { inputs_.set(k_, row, x_ + row * layer_.hidden, 0, layer_.hidden); }

  void gate_and_up(const Group& g, std::int64_t first) const {
    const int count = static_cast<int>(std::min<std::int64_t>(kChunk, layer_.intermediate - first));
    float gate[kGroupRows * kChunk], up[kGroupRows * kChunk];
    QuantizedRow quantized[kGroupRows];
    const float* floats[kGroupRows];
    float *gate_rows[kGroupRows], *up_rows[kGroupRows];
    for (std::size_t from = 0; from < g.slots.size(); from += kGroupRows) {
      const int rows = static_cast<int>(std::min<std::size_t>(kGroupRows, g.slots.size() - from));
      for (int m = 0; m < rows; ++m) {
        const std::int64_t row = g.slots[from + static_cast<std::size_t>(m)] / top_k_;
        if (layer_.format != Format::fp32) quantized[m] = inputs_.quantized(row);
        floats[m] = x_ + row * layer_.hidden;
        gate_rows[m] = gate + m * kChunk;
        up_rows[m] = up + m * kChunk;
      }
      multiply(g.expert, 0, layer_.hidden, first, count, quantized, floats, rows, gate_rows);
      multiply(g.expert, 1, layer_.hidden, first, count, quantized, floats, rows, up_rows);
      for (int m = 0; m < rows; ++m) {
        const std::int64_t slot = g.slots[from + static_cast<std::size_t>(m)];
        float* inner = inner_floats_.get() + slot * layer_.intermediate;
        k_.silu_multiply(gate_rows[m], up_rows[m], inner + first, count);
        inner_.set(k_, slot, inner, first, first + count);
      }
    }
  }

  void down(const Group& g, std::int64_t first) const {
    const int count = static_cast<int>(std::min<std::int64_t>(kChunk, layer_.hidden - first));
    QuantizedRow quantized[kGroupRows];
    const float* floats[kGroupRows];
    float* y[kGroupRows];
    for (std::size_t from = 0; from < g.slots.size(); from += kGroupRows) {
      const int rows = static_cast<int>(std::min<std::size_t>(kGroupRows, g.slots.size() - from));
      for (int m = 0; m < rows; ++m) {
        const std::int64_t slot = g.slots[from + static_cast<std::size_t>(m)];
        if (layer_.format != Format::fp32) quantized[m] = inner_.quantized(slot);
        floats[m] = inner_floats_.get() + slot * layer_.intermediate;
        y[m] = outputs_.get() + slot * layer_.hidden + first;
      }
      multiply(g.expert, 2, layer_.intermediate, first, count, quantized, floats, rows, y);
    }
  }

  void combine(std::int64_t row) const {
    float* y = y_ + row * layer_.hidden;
    std::fill(y, y + layer_.hidden, 0.0f);
    for (std::int64_t slot = row * top_k_; slot < (row + 1) * top_k_; ++slot)
      k_.accumulate(y, outputs_.get() + slot * layer_.hidden, gates_[slot], static_cast<int>(layer_.hidden));
  }

 private:
  // y[m] = weight rows [first, first + count) of a part, times each of `rows` activations
  void multiply(std::int64_t expert, int part, std::int64_t columns, std::int64_t first, int count,
                const QuantizedRow* quantized, const float* const* floats, int rows, float* const* y) const {
    const std::uint8_t* own = layer_.base + expert * layer_.stride_bytes;
    const std::uint8_t* data = own + layer_.data[part] + first * row_bytes(layer_.format, columns);
    if (is_nested(layer_.format)) {
      const bool all = layer_.format == Format::nested8, both = all || layer_.format == Format::nested4;
      const NestedRows weights{
          data, both ? own + layer_.low[part] + first * row_bytes(layer_.format, columns) : nullptr,
          all ? own + layer_.fine[part] + first * row_fine_bytes(columns) : nullptr,
          reinterpret_cast<const std::uint16_t*>(own + layer_.scales[part]) + first * groups_of(columns) * 4,
          static_cast<int>(groups_of(columns))};
      return (all ? k_.multiply_nested8 : both ? k_.multiply_nested4 : k_.multiply_nested2)(weights, count, quantized, rows, y);
    }
    const int blocks = static_cast<int>(ceil_div(columns, kBlock));
    if (layer_.format == Format::fp32)
      return k_.multiply_fp32(reinterpret_cast<const float*>(data), static_cast<int>(columns), 0, count, floats, rows, y);
    const float* scales =
        reinterpret_cast<const float*>(own + layer_.scales[part]) + first * blocks;
    (layer_.format == Format::int8 ? k_.multiply_int8 : k_.multiply_int4)(data, scales, blocks, 0, count, quantized, rows, y);
  }

  const KernelTable& k_;
  const Layer& layer_;
  const float* x_;
  const float* gates_;
  float* y_;
  std::int64_t rows_, top_k_;
  std::vector<Group> groups_;
  // Items of a phase write disjoint parts of these; hence mutable, and no locks.
  mutable Activations inputs_;
  mutable Activations inner_;
  std::unique_ptr<float[]> inner_floats_;
  std::unique_ptr<float[]> outputs_;
};

inline Format named(const std::string& name) {
  if (name == "fp32") return Format::fp32;
  if (name == "int8") return Format::int8;
  if (name == "int4") return Format::int4;
  if (name == "nested2") return Format::nested2;
  if (name == "nested4") return Format::nested4;
  require(name == "nested8", "experts are fp32, int8, int4, nested2, nested4 or nested8");
  return Format::nested8;
}

template <typename Buffer>
Layer checked_layer(const Buffer& buffer, const std::string& format, std::int64_t experts,
                    std::int64_t hidden, std::int64_t intermediate, std::int64_t stride_bytes,
                    const Array<const std::int64_t, 1>& offsets) {
  Layer layer{buffer.data(), named(format), experts, hidden, intermediate, stride_bytes, {}, {}, {}, {}};
  constexpr std::int64_t kLimit = 1 << 28;  // keeps every product below 2^63
  require(experts > 0 && experts < (1 << 20) && hidden > 0 && hidden < kLimit && intermediate > 0 &&
              intermediate < kLimit && stride_bytes >= 0 && stride_bytes < (std::int64_t{1} << 40),
          "experts have impossible sizes");
  const int parts = layer.format == Format::fp32      ? 3
                    : layer.format == Format::nested4 ? 9
                    : layer.format == Format::nested8 ? 12
                                                      : 6;
  require(offsets.shape(0) == static_cast<std::size_t>(parts), "experts need an offset for each part");
  for (int i = 0; i < parts; ++i) {
    const bool is_down = i % 3 == 2, is_scales = i / 3 == 1, is_fine = i / 3 == 3;
    const std::int64_t rows = is_down ? hidden : intermediate, columns = is_down ? intermediate : hidden;
    const std::int64_t row = is_fine ? row_fine_bytes(columns)
                                     : (is_scales ? row_scale_bytes : row_bytes)(layer.format, columns);
    const std::int64_t bytes = rows * row;
    const std::int64_t offset = offsets.data()[i], size = static_cast<std::int64_t>(buffer.size());
    require(offset >= 0 && bytes <= size && offset <= size - bytes &&
                (experts - 1) * stride_bytes <= size - bytes - offset,
            "an expert's weights end outside the slice");
    if (is_scales || layer.format == Format::fp32)
      require((reinterpret_cast<std::uintptr_t>(buffer.data()) + static_cast<std::uintptr_t>(offset | stride_bytes)) % 4 == 0 &&
                  offset % 4 == 0 && stride_bytes % 4 == 0,
              "an expert's floats must lie on 4-byte boundaries");
    (is_scales ? layer.scales : i < 3 ? layer.data : is_fine ? layer.fine : layer.low)[i % 3] = offset;
  }
  return layer;
}

inline void check_rows(const Layer& layer, const Array<const float, 2>& x, const Array<const std::int32_t, 2>& ids,
                       const Array<const float, 2>& gates, const Array<float, 2>& y) {
  const std::size_t rows = x.shape(0), top_k = ids.shape(1);
  require(static_cast<std::int64_t>(x.shape(1)) == layer.hidden, "rows must have the experts' hidden width");
  require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "the result must have the rows' shape");
  require(ids.shape(0) == rows && gates.shape(0) == rows && gates.shape(1) == top_k, "ids and gates must have shape [rows, top_k]");
  for (std::size_t i = 0; i < rows * top_k; ++i)
    require(ids.data()[i] >= 0 && ids.data()[i] < layer.experts, "an expert id is out of range");
}

}  // namespace edge::expert_layer
