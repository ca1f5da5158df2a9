// Memory for weights, one matrix after the other in large pages.
//
// A mapping for each matrix leaves what does not fill a large page at either end in small ones, a third of a model, and
// those are read a fifth more slowly. So matrices share reservations of address space. Each begins on a page of its own,
// which goes back to the system with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

class WeightMemory {
 public:
  explicit WeightMemory(std::size_t size_bytes);
  ~WeightMemory();
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  std::uint8_t* data() const { return data_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_bytes_;  // whole pages
};

}  // namespace edge
