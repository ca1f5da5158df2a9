// A weight matrix in the order `linear` reads it.
//
// Quantized: tiles of 16 outputs. A tile is its blocks of 32 columns, two by two: the codes of both, then the scales of
// both, 16 half floats each (`unit` is the power of two that they were divided by); so that a matrix is one stream of whole
// cache lines. Of an int8 block, byte 64 g + 4 o + i is the code of output o, column 4 g + i. An int4 block is half of that: the codes of byte
// 64 c + 4 o + i are of columns 8 c + i (low) and 8 c + 4 + i (high). Codes keep the bundle's zero points.
// fp32: tiles of 16 outputs, [column][16].
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "arrays.hpp"
#include "kernel_table.hpp"
#include "weight_memory.hpp"

namespace edge {

// Bytes from the system, which asks for large pages and gives everything back.
class SystemMemory {
 public:
  explicit SystemMemory(std::size_t size_bytes);
  ~SystemMemory();
  SystemMemory(const SystemMemory&) = delete;
  SystemMemory& operator=(const SystemMemory&) = delete;
  std::uint8_t* data() const { return data_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_bytes_;
};

class PackedMatrix {
 public:
  PackedMatrix(Array<const std::uint8_t, 3> data, Array<const float, 2> scales, std::int64_t columns, int threads);
  PackedMatrix(Array<const float, 2> weights, int threads);

  std::int64_t outputs() const { return outputs_; }
  std::int64_t columns() const { return columns_; }
  int bits() const { return bits_; }
  int blocks() const { return static_cast<int>((columns_ + kBlock - 1) / kBlock); }
  int zero_point() const { return 1 << (bits_ - 1); }
  std::int64_t tiles() const { return (outputs_ + kTileOutputs - 1) / kTileOutputs; }
  float unit() const { return unit_; }
  const std::uint8_t* tile(std::int64_t index) const { return memory_.data() + index * tile_bytes_; }
  const float* fp32_tile(std::int64_t index) const { return reinterpret_cast<const float*>(tile(index)); }
  std::int64_t bytes() const { return tiles() * tile_bytes_; }

 private:
  void pack_tile(const std::uint8_t* data, const float* scales, std::int64_t index);

  std::int64_t outputs_, columns_;
  int bits_;
  float unit_ = 1.0f;
  std::int64_t tile_bytes_ = 0;
  WeightMemory memory_;
};

}  // namespace edge
