// Programs and the attention between them, run in one call: the helpers stay at work from the first layer to the last.
//
// Values are numbered: 0 comes in, `result` goes out, and each value is what was last written to it. Nothing here
// computes: the arithmetic is that of a Program's phases and of `attend`, so a chain gives the bits of its parts run one
// by one. While a thread waits for the others, it fetches the beginning of the weights that it reads next.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "attention_tiles.hpp"
#include "heads.hpp"
#include "program.hpp"

namespace edge {

class Chain {
 public:
  using Table = std::optional<Array<const float, 2>>;
  using Vector = std::optional<Array<const float, 1>>;

  Chain(std::vector<std::int64_t> widths, int result);

  void program(Program& program, std::vector<int> inputs, std::vector<int> outputs);
  // `values`: queries, keys, values, result.
  void attention(std::vector<int> values, int layer, int heads, int kv_heads, int head_dim, float scale, int window,
                 float softcap, bool causal, Table cos, Table sin, Vector q_norm, Vector k_norm, float epsilon);
  template <typename Element>
  void run(Array<const float, 2> x, Array<float, 2> out, Array<Element, 6> pool, Array<const std::int32_t, 1> positions,
           Array<const std::int32_t, 1> sequence, Array<const std::int32_t, 2> tables,
           Array<const std::int32_t, 1> lengths, int threads);

 private:
  struct Attention {
    int layer;
    Shape shape;
    HeadsPreparation q, k;
  };
  struct Part {
    Program* program;  // or null: attention
    std::vector<int> values;
    Attention attention;
  };
  template <typename Element>
  class Step;

  std::int64_t checked(int value, bool is_written);
  HeadsPreparation heads(int count, int head_dim, const Table& cos, const Table& sin, const Vector& weight, float epsilon);

  std::vector<std::int64_t> widths_;
  std::vector<bool> is_written_;
  int result_;
  std::vector<Part> parts_;
  std::vector<Table> tables_;    // kept alive
  std::vector<Vector> vectors_;
  std::int64_t most_positions_;  // of the shortest rotary table
  std::int64_t prepared_width_ = 0;
};

}  // namespace edge
