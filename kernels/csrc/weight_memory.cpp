#include "weight_memory.hpp"

#include <algorithm>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace edge {

#if defined(__unix__) || defined(__APPLE__)
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr std::size_t kReservation = std::size_t{256} << 20;  // of addresses: memory comes when it is written

std::size_t whole(std::size_t size_bytes, std::size_t unit) { return (size_bytes + unit - 1) / unit * unit; }

// Begins and ends with a large page.
std::uint8_t* reserve(std::size_t size_bytes) {
  void* mapped = mmap(nullptr, size_bytes + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<std::uint8_t*>(mapped);
  const std::size_t before = whole(reinterpret_cast<std::uintptr_t>(begin), kLargePage) - reinterpret_cast<std::uintptr_t>(begin);
  if (before > 0) munmap(begin, before);
  if (before < kLargePage) munmap(begin + before + size_bytes, kLargePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, size_bytes, MADV_HUGEPAGE);
#endif
  return begin + before;
}

class Reservations {
 public:
  std::uint8_t* take(std::size_t size_bytes) {
    const std::lock_guard<std::mutex> held(mutex_);
    if (left_bytes_ < size_bytes) {
      const std::size_t reserved_bytes = std::max(kReservation, whole(size_bytes, kLargePage));
      std::uint8_t* reserved = reserve(reserved_bytes);
      if (left_bytes_ > 0) munmap(next_, left_bytes_);
      next_ = reserved;
      left_bytes_ = reserved_bytes;
    }
    std::uint8_t* taken = next_;
    next_ += size_bytes;
    left_bytes_ -= size_bytes;
    return taken;
  }

 private:
  std::mutex mutex_;
  std::uint8_t* next_ = nullptr;
  std::size_t left_bytes_ = 0;
};

Reservations& reservations() {
  static Reservations& all = *new Reservations;  // outlives every matrix
  return all;
}

}  // namespace

WeightMemory::WeightMemory(std::size_t size_bytes)
    : size_bytes_(whole(size_bytes, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)))) {
  if (size_bytes_ > 0) data_ = reservations().take(size_bytes_);
}
WeightMemory::~WeightMemory() {
  if (data_) munmap(data_, size_bytes_);
}
#else
WeightMemory::WeightMemory(std::size_t size_bytes) : size_bytes_(size_bytes) {
  if (size_bytes) data_ = static_cast<std::uint8_t*>(::operator new(size_bytes, std::align_val_t{64}));
}
WeightMemory::~WeightMemory() {
  if (data_) ::operator delete(data_, std::align_val_t{64});
}
#endif

}  // namespace edge
