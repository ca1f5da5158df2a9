// Some rows of a program on their way through its phases.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.hpp"
#include "parallel.hpp"
#include "program.hpp"

namespace edge {

constexpr std::int64_t kChunkRows = 128;
constexpr std::int64_t kGroupTiles = 4;
constexpr std::int64_t kThreadShare = 1 << 19;  // weight bytes a thread must read to be worth a hand-over

struct WeightBytes {
  const std::uint8_t* data;
  std::int64_t size_bytes;
};

class Program::Chunk {
 public:
  Chunk(const Program& program, float* scratch, std::int64_t rows) : p_(program), k_(kernels()), rows_(rows) {
    for (const Slot& slot : p_.slots_) places_.push_back(scratch + slot.offset * rows);
  }
  void set(int slot, float* data) { places_[static_cast<std::size_t>(slot)] = data; }

  void run(int threads) const {
    std::vector<std::int64_t> items;
    for (int phase = 0; phase < phases(); ++phase) items.push_back(this->items(phase));
    run_phases(threads, std::move(items), [&](int phase, std::int64_t item, int) { work(phase, item); });
  }

  int phases() const { return static_cast<int>(p_.phases_.size()); }
  std::int64_t items(int phase) const {
    const Phase& now = at_phase(phase);
    return now.linears.empty() ? rows_ : now.items;
  }
  void work(int phase, std::int64_t item) const {
    const Phase& now = at_phase(phase);
    if (now.linears.empty())
      for (const RowStep& step : now.rows) row(step, item);
    else
      group(now, item);
  }
  // The weights that an item of a phase reads, and those behind it in the same matrix; none where it works on rows.
  WeightBytes weights(int phase, std::int64_t item) const {
    const Phase& now = at_phase(phase);
    if (now.linears.empty()) return {nullptr, 0};
    const LinearStep& step = step_of(now, item);
    const std::int64_t tile = (item - step.first_item) * kGroupTiles;
    return {step.matrix->tile(tile), step.matrix->bytes() / step.matrix->tiles() * (step.matrix->tiles() - tile)};
  }

 private:
  const Phase& at_phase(int phase) const { return p_.phases_[static_cast<std::size_t>(phase)]; }

  static const LinearStep& step_of(const Phase& phase, std::int64_t item) {
    auto step = phase.linears.end() - 1;
    while (step->first_item > item) --step;
    return *step;
  }

  float* at(int slot, std::int64_t row) const {
    return places_[static_cast<std::size_t>(slot)] + row * p_.slots_[static_cast<std::size_t>(slot)].width;
  }

  void row(const RowStep& step, std::int64_t row) const {
    if (step.is_quantize) {
      const Slot& to = p_.slots_[static_cast<std::size_t>(step.out)];
      const std::int64_t panel = row / kPanelRows * kPanelRows, blocks = to.width / 10, in_panel = row - panel;
      std::int8_t* codes = reinterpret_cast<std::int8_t*>(places_[static_cast<std::size_t>(step.out)]);
      float* after = places_[static_cast<std::size_t>(step.out)] + rows_ * blocks * 8;
      const PanelRowOut out{codes + (panel * blocks + in_panel) * kBlock,
                            reinterpret_cast<std::int32_t*>(after) + panel * blocks + in_panel,
                            after + rows_ * blocks + panel * blocks + in_panel, std::min<std::int64_t>(kPanelRows, rows_ - panel)};
      return k_.quantize_row(at(step.a, row), static_cast<int>(to.columns), 1 << (to.bits - 1), out);
    }
    k_.row_operation(step.operation, at(step.a, row), step.b < 0 ? nullptr : at(step.b, row), at(step.out, row));
  }

  void group(const Phase& phase, std::int64_t item) const {
    const LinearStep& step = step_of(phase, item);
    const std::int64_t first = (item - step.first_item) * kGroupTiles;
    const std::int64_t last = std::min(first + kGroupTiles, step.matrix->tiles());
    if (step.matrix->bits() == 32) return products(step, first, last);
    for (std::int64_t panel = 0; panel < rows_; panel += kPanelRows)
      tiles(step, first, last, panel, std::min<std::int64_t>(kPanelRows, rows_ - panel));
  }

  void tiles(const LinearStep& step, std::int64_t first, std::int64_t last, std::int64_t panel, std::int64_t count) const {
    const PackedMatrix& matrix = *step.matrix;
    const std::int64_t blocks = matrix.blocks();
    const float* place = places_[static_cast<std::size_t>(step.in)];
    const float* after = place + rows_ * blocks * 8;
    const PanelRows x{reinterpret_cast<const std::int8_t*>(place) + panel * blocks * kBlock,
                      reinterpret_cast<const std::int32_t*>(after) + panel * blocks,
                      after + rows_ * blocks + panel * blocks, count};
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t n = tile * kTileOutputs;
      const TileOut out{at(step.out, panel) + n, matrix.outputs(),
                        static_cast<int>(std::min<std::int64_t>(kTileOutputs, matrix.outputs() - n)), matrix.unit(),
                        step.bias ? step.bias + n : nullptr};
      (matrix.bits() == 8 ? k_.linear_int8 : k_.linear_int4)(matrix.tile(tile), static_cast<int>(blocks), x, out);
    }
  }

  // Two tiles at a time, which stay in the second cache while all rows go by.
  void products(const LinearStep& step, std::int64_t first, std::int64_t last) const {
    const PackedMatrix& matrix = *step.matrix;
    for (std::int64_t tile = first; tile < last; tile += 2) {
      const std::int64_t n = tile * kTileOutputs, end = std::min(matrix.outputs(), std::min(tile + 2, last) * kTileOutputs);
      const TileOut out{at(step.out, 0) + n, matrix.outputs(), static_cast<int>(end - n), 1.0f,
                        step.bias ? step.bias + n : nullptr};
      k_.linear_fp32(matrix.fp32_tile(tile), matrix.columns(), at(step.in, 0), matrix.columns(), static_cast<int>(rows_), out);
    }
  }

  const Program& p_;
  const KernelTable& k_;
  std::int64_t rows_;
  std::vector<float*> places_;
};

}  // namespace edge
