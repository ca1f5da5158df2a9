#include "ring.hpp"

#include <cerrno>
#include <cstring>
#include <system_error>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#define EDGE_HAS_RING 1
#endif

namespace edge {

#ifdef EDGE_HAS_RING

namespace {

// The same on all architectures; older headers lack them.
constexpr long kSetup = 425, kEnter = 426;

constexpr unsigned kTogether = 2;  // reads of the first call: of more, the kernel begins none before it has prepared all

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

unsigned* at(void* base, std::uint32_t offset) { return reinterpret_cast<unsigned*>(static_cast<char*>(base) + offset); }

}  // namespace

Ring::Ring(unsigned entries) {
  io_uring_params p{};
  file_ = static_cast<int>(syscall(kSetup, entries, &p));
  if (file_ < 0) fail("io_uring_setup");
  try {
    if (!(p.features & IORING_FEAT_SINGLE_MMAP)) {
      errno = ENOSYS;
      fail("io_uring of Linux 5.4 or later");
    }
    const std::size_t asked = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    const std::size_t done = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
    rings_ = map(rings_bytes_ = asked > done ? asked : done, IORING_OFF_SQ_RING);
    reads_ = map(reads_bytes_ = p.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
  } catch (...) {
    close();
    throw;
  }
  entries_ = p.sq_entries;
  tail_ = at(rings_, p.sq_off.tail);
  order_ = at(rings_, p.sq_off.array);
  mask_ = *at(rings_, p.sq_off.ring_mask);
  done_head_ = at(rings_, p.cq_off.head);
  done_tail_ = at(rings_, p.cq_off.tail);
  done_mask_ = *at(rings_, p.cq_off.ring_mask);
  done_ = static_cast<char*>(rings_) + p.cq_off.cqes;
}

Ring::~Ring() { close(); }

void* Ring::map(std::size_t bytes, std::uint64_t offset) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file_, static_cast<off_t>(offset));
  if (memory == MAP_FAILED) fail("io_uring mmap");
  return memory;
}

void Ring::close() {
  if (rings_) munmap(rings_, rings_bytes_);
  if (reads_) munmap(reads_, reads_bytes_);
  if (file_ >= 0) ::close(file_);
}

bool Ring::read(int file, std::uint8_t* target, std::uint32_t bytes, std::uint64_t offset, std::uint64_t key) {
  if (in_flight_ + prepared_ == entries_) return false;
  const unsigned tail = *tail_, place = tail & mask_;
  io_uring_sqe& entry = static_cast<io_uring_sqe*>(reads_)[place];
  std::memset(&entry, 0, sizeof entry);
  entry.opcode = IORING_OP_READ;
  entry.fd = file;
  entry.addr = reinterpret_cast<std::uint64_t>(target);
  entry.len = bytes;
  entry.off = offset;
  entry.user_data = key;
  order_[place] = place;
  __atomic_store_n(tail_, tail + 1, __ATOMIC_RELEASE);
  ++prepared_;
  return true;
}

void Ring::submit() {
  while (prepared_) {
    const unsigned most = in_flight_ ? prepared_ : kTogether;  // while flash is busy, calls can be few
    const long count = syscall(kEnter, file_, prepared_ < most ? prepared_ : most, 0, 0, nullptr, 0);
    if (count < 0 && errno != EINTR && errno != EAGAIN) fail("io_uring_enter");
    if (count > 0) prepared_ -= static_cast<unsigned>(count), in_flight_ += static_cast<unsigned>(count);
  }
}

bool Ring::take(Completion* completion) {
  const unsigned head = *done_head_;
  if (head == __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE)) return false;
  const io_uring_cqe& entry = static_cast<const io_uring_cqe*>(done_)[head & done_mask_];
  *completion = {entry.user_data, entry.res};
  __atomic_store_n(done_head_, head + 1, __ATOMIC_RELEASE);
  --in_flight_;
  return true;
}

bool Ring::is_ready() const { return *done_head_ != __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE); }

void Ring::wait() {
  while (syscall(kEnter, file_, 0, 1, IORING_ENTER_GETEVENTS, nullptr, 0) < 0)
    if (errno != EINTR) fail("io_uring_enter");
}

#else

namespace {
[[noreturn]] void none() { throw std::system_error(std::make_error_code(std::errc::function_not_supported), "io_uring"); }
}  // namespace

Ring::Ring(unsigned) { none(); }
Ring::~Ring() = default;
bool Ring::read(int, std::uint8_t*, std::uint32_t, std::uint64_t, std::uint64_t) { none(); }
void Ring::submit() { none(); }
bool Ring::take(Completion*) { none(); }
bool Ring::is_ready() const { none(); }
void Ring::wait() { none(); }

#endif

}  // namespace edge
