// Experts of one layer while some of them are still on their way from flash.
//
// One list of work for all threads: chunks of the products of experts that are here, and parts of what has come to be
// hashed, which go first. The calling thread also asks for what is missing and looks whether something has come. An
// expert is computed as soon as its bytes are there, beside their hashing, so that little is left to do after the last
// byte; the result is only made where all were right. Outputs are kept apart and summed in gate order at the end, so the
// bits are those of all experts in memory.
//
// Checks may also be put off: they are made, with those put off before, while there is nothing else to do, and the result
// is made when all bytes have come. A part that did not come makes for all checks at once, and no result, either way.
#pragma once

#include <chrono>
#include <deque>
#include <mutex>
#include <vector>

#include "experts_run.hpp"
#include "flash.hpp"

namespace edge {

class Spin {
 public:
  void lock() {
    while (taken_.test_and_set(std::memory_order_acquire)) pause_awake();
  }
  void unlock() { taken_.clear(std::memory_order_release); }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

class Arriving {
 public:
  // Every part of `reads` says which group of `run` it is of.
  Arriving(const expert_layer::Run& run, FlashReads& reads, bool checks_later = false);

  // All groups computed, as far as they came, and all parts checked, or come.
  void operator()(int threads);
  bool is_whole() const { return !failed_; }
  // Checks that are left to be made, of these reads and earlier ones.
  std::deque<FlashLeaf> leave_checks() { return std::exchange(checks_, {}); }

 private:
  enum class Kind { hash, inner, outer };

  struct Work {
    Kind kind;
    std::int64_t group, chunk;
    FlashLeaf leaf;
  };

  struct State {
    int missing = 0;  // parts of which not every byte has come
    bool is_lost = false;
    std::atomic<std::int64_t> chunks{0};
  };

  State& state(std::int64_t group) { return groups_[static_cast<std::size_t>(group)]; }
  void take_part(bool is_caller);
  void compute(const Work& work);
  bool next(Work* work, bool is_caller);
  bool take(Work* work);
  void look();
  void came(FlashPart* part);
  void settled(FlashPart* part);
  void checked(FlashPart* part);
  void add(Kind kind, std::int64_t group, std::int64_t chunks);

  const expert_layer::Run& run_;
  FlashReads& reads_;
  const bool checks_later_;
  std::vector<State> groups_;
  const std::int64_t begun_ = FlashTimes::now();
  std::int64_t all_came_ = 0;  // when
  std::atomic<bool> is_looked_after_{false};
  std::atomic<std::int64_t> coming_;  // parts of which not every byte has come
  std::atomic<std::int64_t> open_;    // groups that are neither computed nor lost, and parts that are not settled, or come
  Spin spin_;                       // of all below
  std::deque<Work> work_;
  std::deque<FlashLeaf> checks_;      // put off
  std::atomic<std::size_t> count_{0};  // of both
  bool failed_ = false;
  FlashNews news_;  // of the calling thread
};

}  // namespace edge
