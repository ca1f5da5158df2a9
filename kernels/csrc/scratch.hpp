// Floats that live for one call, in memory that is kept for the next one.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "packed_matrix.hpp"

namespace edge {

// Memory between operations, kept from call to call: fresh pages would have to be zeroed every time.
class Scratch {
 public:
  explicit Scratch(std::size_t floats) : lock_(mutex(), std::try_to_lock) {
    if (!lock_.owns_lock()) {
      own_.reset(new float[floats]);
      data_ = own_.get();
      return;
    }
    static std::unique_ptr<SystemMemory>& kept = *new std::unique_ptr<SystemMemory>;
    static std::size_t size = 0;
    if (size < floats) {
      kept.reset();
      kept = std::make_unique<SystemMemory>(floats * sizeof(float));
      size = floats;
    }
    data_ = reinterpret_cast<float*>(kept->data());
  }
  float* data() const { return data_; }

 private:
  static std::mutex& mutex() {
    static std::mutex& made = *new std::mutex;
    return made;
  }
  std::unique_lock<std::mutex> lock_;
  std::unique_ptr<float[]> own_;
  float* data_;
};

}  // namespace edge
