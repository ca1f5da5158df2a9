// Waits for an event loop's descriptors, and takes a list that is due from its socket before anything else is done.
//
// After a step has read its weights all other code is cold, and each line of Python between a descriptor that is ready and
// a row in its place costs five to ten times what it costs in a loop. Here they are one call, without the interpreter's
// lock. Whatever is not exactly what was expected is handed over as it came.
//
// Knows: one socket of libzmq, by the calls that it is given, and the bytes around the one hole in what is expected. Does
// not know: messages, peers, what a row means. `edge_runtime/transport/expected.py` is the reference of the comparison.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"

#if defined(__linux__)
#include <sys/epoll.h>
#endif

namespace edge {
namespace {

constexpr int kNothing = 0, kExpected = 1, kOther = 2;  // what `wait` took
constexpr int kDontWait = 1, kSourceFd = 2;             // as zmq.h has them

struct alignas(std::max_align_t) ZmqMessage {
  unsigned char opaque[64];  // zmq_msg_t
};

// zmq_msg_…, in the order in which their addresses are given.
struct ZmqCalls {
  int (*init)(ZmqMessage*);
  int (*recv)(ZmqMessage*, void*, int);
  int (*close)(ZmqMessage*);
  void* (*data)(ZmqMessage*);
  std::size_t (*size)(const ZmqMessage*);
  int (*more)(const ZmqMessage*);
  int (*get)(const ZmqMessage*, int);
  const char* (*gets)(const ZmqMessage*, const char*);
};

class Part {
 public:
  explicit Part(const ZmqCalls& calls) : calls_(calls) { calls_.init(&message_); }
  ~Part() { calls_.close(&message_); }
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

  bool receive(void* socket) { return calls_.recv(&message_, socket, kDontWait) >= 0; }
  const char* data() { return static_cast<const char*>(calls_.data(&message_)); }
  std::size_t size() const { return calls_.size(&message_); }
  bool more() const { return calls_.more(&message_) != 0; }
  int source_fd() const { return calls_.get(&message_, kSourceFd); }
  std::string user() const {
    const char* found = calls_.gets(&message_, "User-Id");
    return found == nullptr ? "" : found;
  }
  nb::bytes bytes() { return nb::bytes(data(), size()); }

 private:
  const ZmqCalls& calls_;
  ZmqMessage message_;
};

// `before`, a hole, `after`, which ends where the row begins.
struct Expected {
  std::size_t row_at;
  std::string before, after;
};

class Inlet {
 public:
  using Place = std::optional<Array<std::uint8_t, 1>>;

  Inlet(const std::vector<std::uintptr_t>& calls, std::uintptr_t socket) : socket_(reinterpret_cast<void*>(socket)) {
    require(calls.size() * sizeof(std::uintptr_t) == sizeof(ZmqCalls), "calls: eight addresses are needed");
    std::memcpy(&calls_, calls.data(), sizeof(calls_));
  }

  Inlet(const Inlet&) = delete;
  Inlet& operator=(const Inlet&) = delete;

  void expect(nb::bytes routing_id, std::string user, const std::vector<std::tuple<std::size_t, nb::bytes, nb::bytes>>& pieces,
              Place place) {
    std::vector<Expected> expected;
    for (const auto& [row_at, before, after] : pieces) {
      require(before.size() + after.size() <= row_at, "pieces: bytes around a hole that overlap");
      expected.push_back({row_at, {before.c_str(), before.size()}, {after.c_str(), after.size()}});
    }
    routing_id_.assign(routing_id.c_str(), routing_id.size());
    user_ = std::move(user);
    expected_ = std::move(expected);
    place_ = std::move(place);
    row_bytes_ = place_ ? place_->shape(0) : 0;
    row_ = place_ ? place_->data() : nullptr;
  }

  // Nothing is taken where anything but the socket is ready, or nothing in time.
  int wait(int epoll_fd, int socket_fd, int timeout_milliseconds) {
#if defined(__linux__)
    nb::gil_scoped_release released;
    epoll_event ready[2];
    if (::epoll_wait(epoll_fd, ready, 2, timeout_milliseconds) != 1 || ready[0].data.fd != socket_fd) return kNothing;
    return take();
#else
    (void)epoll_fd, (void)socket_fd, (void)timeout_milliseconds;
    return kNothing;
#endif
  }

  nb::bytes hole() const { return nb::bytes(hole_.data(), hole_.size()); }

  // Once: the routing id, the user and the descriptor of the link that the list came over, its parts.
  nb::tuple taken() {
    nb::list parts;
    for (std::size_t at = 1; at < parts_.size(); ++at) parts.append(parts_[at].bytes());
    require(nb::len(parts) > 0, "nothing was taken");
    nb::tuple found = nb::make_tuple(parts_[0].bytes(), parts_[1].user(), parts_[1].source_fd(), parts);
    parts_.clear();
    return found;
  }

 private:
  // The routing id, then the list; libzmq gives all of it or nothing.
  int take() {
    parts_.clear();
    do {
      parts_.emplace_back(calls_);
      if (parts_.back().receive(socket_)) continue;
      parts_.clear();
      return kNothing;
    } while (parts_.back().more());
    if (parts_.size() < 2) {
      parts_.clear();
      return kNothing;
    }
    return parts_.size() == 2 && is_of_them() && matches() ? kExpected : kOther;
  }

  bool is_of_them() {
    Part& id = parts_[0];
    return id.size() == routing_id_.size() && std::memcmp(id.data(), routing_id_.data(), id.size()) == 0 &&
           parts_[1].user() == user_;
  }

  bool matches() {
    const char* data = parts_[1].data();
    for (const Expected& each : expected_) {
      if (parts_[1].size() != each.row_at + row_bytes_) continue;
      const std::size_t hole_at = each.before.size(), after_at = each.row_at - each.after.size();
      if (std::memcmp(data, each.before.data(), hole_at) != 0) return false;
      if (std::memcmp(data + after_at, each.after.data(), each.after.size()) != 0) return false;
      hole_.assign(data + hole_at, after_at - hole_at);
      if (row_bytes_ > 0) std::memcpy(row_, data + each.row_at, row_bytes_);
      return true;
    }
    return false;
  }

  ZmqCalls calls_;
  void* socket_;
  std::string routing_id_, user_, hole_;
  std::vector<Expected> expected_;
  Place place_;
  std::uint8_t* row_ = nullptr;
  std::size_t row_bytes_ = 0;
  std::deque<Part> parts_;
};

}  // namespace

void bind_inlet(nb::module_& m) {
  nb::class_<Inlet>(m, "Inlet")
      .def(nb::init<const std::vector<std::uintptr_t>&, std::uintptr_t>())
      .def("expect", &Inlet::expect, nb::arg("routing_id"), nb::arg("user"), nb::arg("pieces"), nb::arg("place").none())
      .def("wait", &Inlet::wait)
      .def("hole", &Inlet::hole)
      .def("taken", &Inlet::taken);
}

}  // namespace edge
