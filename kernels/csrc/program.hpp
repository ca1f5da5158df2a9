// A short list of operations on rows, run in one call: what lies between two cut operations of a block.
//
// Values are slots. Operations that follow each other and look at one row at a time form a phase, whose items are rows;
// matrix products that don't need each other form a phase, whose items are groups of tiles. Rows go through in chunks,
// so that what is between stays in the cache.
#pragma once

#include <vector>

#include "packed_matrix.hpp"

namespace edge {

class Program {
 public:
  // Slots 0 .. inputs - 1 are the inputs, in order; the next ones the outputs.
  Program(std::vector<std::int64_t> input_widths, std::vector<std::int64_t> output_widths);

  int slot(std::int64_t width);
  int quantized(std::int64_t columns, int bits);
  void row(const std::string& kind, int a, int b, int out, std::optional<Array<const float, 1>> weight,
           std::optional<Array<const float, 1>> bias, float parameter);
  void quantize(int in, int out);
  void linear(const PackedMatrix& matrix, int in, int out, std::optional<Array<const float, 1>> bias);
  void run(const std::vector<Array<const float, 2>>& inputs, const std::vector<Array<float, 2>>& outputs, int threads);

  // What a caller needs that runs the phases itself (program_chunk.hpp), after `prepare`.
  class Chunk;
  void prepare();
  std::size_t inputs() const { return inputs_; }
  std::size_t outputs() const { return outputs_; }
  std::int64_t width(std::size_t slot) const { return slots_[slot].width; }
  std::int64_t scratch_width() const { return scratch_width_; }
  std::int64_t weight_bytes() const;

 private:
  struct Slot {
    std::int64_t width;        // floats of a row; of a quantized one, what a row takes
    int bits;                  // 32, or of the weights it was quantized for
    std::int64_t columns;
    int first = -1, last = -1;  // phases that touch it
    std::int64_t offset = 0;    // floats before it in the scratch, for each row of a chunk
  };
  struct RowStep {
    RowOperation operation;
    int a, b, out;
    bool is_quantize;
  };
  struct LinearStep {
    const PackedMatrix* matrix;
    int in, out;
    const float* bias;
    std::int64_t first_item;
  };
  struct Phase {
    std::vector<RowStep> rows;
    std::vector<LinearStep> linears;
    std::int64_t items = 0;  // of linears
    std::int64_t weight_bytes = 0;
  };

  Slot& checked(int index, bool is_quantized, bool is_written);
  void touch(int index, int phase);
  void place();
  const float* keep(const std::optional<Array<const float, 1>>& vector, std::int64_t width);

  std::vector<Slot> slots_;
  std::size_t inputs_, outputs_;
  std::vector<Phase> phases_;
  std::vector<Array<const float, 1>> vectors_;
  std::int64_t scratch_width_ = -1;  // -1: not placed yet
};

}  // namespace edge
