// Reads that the kernel does on its own (Linux io_uring, through its system calls): asked for and collected by one thread.
#pragma once

#include <cstdint>
#include <cstddef>

namespace edge {

struct Completion {
  std::uint64_t key;
  int result;  // bytes read, or minus an errno
};

class Ring {
 public:
  // Throws std::system_error where there is none to be had: an old or another system, a sandbox that forbids it.
  explicit Ring(unsigned entries);
  ~Ring();  // nothing may be in flight
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // False: no room until some are collected. Nothing begins before `submit`.
  bool read(int file, std::uint8_t* target, std::uint32_t bytes, std::uint64_t offset, std::uint64_t key);
  // Throws std::system_error.
  void submit();
  // The next completion, if there is one.
  bool take(Completion* completion);
  // Whether `take` has one.
  bool is_ready() const;
  // Until there is one; something must be in flight. Throws std::system_error.
  void wait();

 private:
  void* map(std::size_t bytes, std::uint64_t offset);
  void close();

  int file_ = -1;
  unsigned entries_ = 0, prepared_ = 0, in_flight_ = 0;
  void* rings_ = nullptr;
  void* reads_ = nullptr;
  std::size_t rings_bytes_ = 0, reads_bytes_ = 0;
  unsigned *tail_ = nullptr, *order_ = nullptr, *done_head_ = nullptr, *done_tail_ = nullptr;
  unsigned mask_ = 0, done_mask_ = 0;
  void* done_ = nullptr;
};

}  // namespace edge
