// Experts of one layer while some of them are still on their way from flash.
//
// One list of work for all threads: chunks of the products of experts that are here, and parts of what has come to be
// hashed, which go first, since more work follows from them. The calling thread also looks whether something has come.
// Outputs are kept apart and summed in gate order at the end, so the bits are those of all experts in memory.
#include <chrono>
#include <deque>
#include <mutex>
#include <unordered_map>

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "experts_run.hpp"
#include "flash.hpp"

namespace edge {

using namespace expert_layer;

namespace {

// Of helpers. One that leaves does not come back before the layer is done, so it is long: only flash that stalls, for a
// moment of which one thread more or less makes no difference, outlasts it.
constexpr auto kHelperAwake = std::chrono::milliseconds(20);

class Spin {
 public:
  void lock() {
    while (taken_.test_and_set(std::memory_order_acquire)) pause_awake();
  }
  void unlock() { taken_.clear(std::memory_order_release); }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

enum class Kind { hash, inner, outer };

struct Work {
  Kind kind;
  std::int64_t group, chunk;
  FlashLeaf leaf;
};

class Arriving {
 public:
  // `parts`: by key, which group it is of. A group misses as many as name it.
  Arriving(const Run& run, FlashReads& reads, const std::unordered_map<std::int64_t, std::int64_t>& parts)
      : run_(run), reads_(reads), parts_(parts), groups_(run.groups().size()), open_(static_cast<std::int64_t>(groups_.size())) {
    for (const auto& [key, group] : parts_) ++groups_[static_cast<std::size_t>(group)].missing;
    for (std::size_t group = 0; group < groups_.size(); ++group)
      if (!groups_[group].missing) begin(static_cast<std::int64_t>(group));
  }

  // Without the caller helpers leave when there is nothing to do; with it when all is done.
  void take_part(bool is_caller) {
    if (is_caller) is_looked_after_.store(true, std::memory_order_relaxed);
    for (Work work; next(&work, is_caller);) {
      if (work.kind == Kind::hash) {
        if (FlashPart* part = FlashReads::hash(work.leaf)) brought(part);
        continue;
      }
      const Group& group = run_.group(work.group);
      State& state = groups_[static_cast<std::size_t>(work.group)];
      if (work.kind == Kind::inner)
        run_.gate_and_up(group, work.chunk * kChunk);
      else
        run_.down(group, work.chunk * kChunk);
      if (state.chunks.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      if (work.kind == Kind::inner)
        add(Kind::outer, work.group, run_.outer_chunks());
      else
        open_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool is_whole() const { return !failed_; }

 private:
  struct State {
    int missing = 0;  // parts
    bool is_lost = false;
    std::atomic<std::int64_t> chunks{0};
  };

  void begin(std::int64_t group) { add(Kind::inner, group, run_.inner_chunks()); }

  void add(Kind kind, std::int64_t group, std::int64_t chunks) {
    groups_[static_cast<std::size_t>(group)].chunks.store(chunks, std::memory_order_relaxed);
    const std::lock_guard<Spin> lock(spin_);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) work_.push_back({kind, group, chunk, {}});
    count_.store(work_.size(), std::memory_order_release);
  }

  // A part is there, or given up.
  void brought(FlashPart* part) {
    const std::int64_t group = parts_.at(part->key);
    State& state = groups_[static_cast<std::size_t>(group)];
    bool is_complete;
    {
      const std::lock_guard<Spin> lock(spin_);
      part->is_done = true;
      if (part->problem != kPartRight) state.is_lost = failed_ = true;
      is_complete = --state.missing == 0;
    }
    if (!is_complete) return;
    if (state.is_lost)
      open_.fetch_sub(1, std::memory_order_release);
    else
      begin(group);
  }

  bool next(Work* work, bool is_caller) {
    const auto start = std::chrono::steady_clock::now();
    bool waits = false;  // for flash
    const auto leave = [&](bool found) {
      if (waits) reads_.waited(std::chrono::steady_clock::now() - start);
      return found;
    };
    while (true) {
      if (is_caller) look();
      if (count_.load(std::memory_order_acquire)) {
        const std::lock_guard<Spin> lock(spin_);
        if (!work_.empty()) {
          *work = work_.front();
          work_.pop_front();
          count_.store(work_.size(), std::memory_order_relaxed);
          return leave(true);
        }
      }
      if (!open_.load(std::memory_order_acquire)) return leave(false);
      pause_awake();
      const auto idle = std::chrono::steady_clock::now() - start;
      if (!is_caller && (idle > kHelperAwake || !is_looked_after_.load(std::memory_order_relaxed))) return false;
      if (!is_caller || !reads_.is_waiting()) continue;
      waits = true;
      if (idle > kFlashAwake) reads_.wait();
    }
  }

  // Of the calling thread.
  void look() {
    if (!reads_.is_waiting()) return;
    reads_.poll(&leaves_, &lost_);
    if (!leaves_.empty()) {
      const std::lock_guard<Spin> lock(spin_);
      for (auto leaf = leaves_.rbegin(); leaf != leaves_.rend(); ++leaf) work_.push_front({Kind::hash, 0, 0, *leaf});
      count_.store(work_.size(), std::memory_order_release);
      leaves_.clear();
    }
    for (FlashPart* part : lost_) brought(part);
    lost_.clear();
  }

  const Run& run_;
  FlashReads& reads_;
  const std::unordered_map<std::int64_t, std::int64_t>& parts_;
  std::vector<State> groups_;
  std::atomic<bool> is_looked_after_{false};
  std::atomic<std::int64_t> open_;  // groups that are neither computed nor lost
  Spin spin_;                       // of all below
  std::deque<Work> work_;
  std::atomic<std::size_t> count_{0};
  bool failed_ = false;
  std::vector<FlashLeaf> leaves_;  // of the calling thread
  std::vector<FlashPart*> lost_;
};

// keys [n]: of all parts that `reads` has on their way; slots [n]: the expert each is of, among `ids`. `y` is only made
// where all came right.
FlashReads::Landed run_arriving(FlashReads& reads, Array<const std::int64_t, 1> keys, Array<const std::int32_t, 1> slots,
                                Array<const float, 2> x, Array<const std::int32_t, 2> ids, Array<const float, 2> gates,
                                Array<const std::uint8_t, 1> buffer, const std::string& format, std::int64_t experts,
                                std::int64_t hidden, std::int64_t intermediate, std::int64_t stride_bytes,
                                Array<const std::int64_t, 1> offsets, Array<float, 2> y, int threads) {
  const Layer layer = checked_layer(buffer, format, experts, hidden, intermediate, stride_bytes, offsets);
  check_rows(layer, x, ids, gates, y);
  require(keys.shape(0) == slots.shape(0) && static_cast<std::int64_t>(keys.shape(0)) == reads.parts(),
          "every part on its way needs the slot it is for");
  const auto rows = static_cast<std::int64_t>(x.shape(0)), top_k = static_cast<std::int64_t>(ids.shape(1));
  const Run run(layer, x.data(), ids.data(), gates.data(), y.data(), rows, top_k);
  std::unordered_map<std::int64_t, std::int64_t> group_of, parts;
  for (std::size_t group = 0; group < run.groups().size(); ++group)
    group_of[run.groups()[group].expert] = static_cast<std::int64_t>(group);
  for (std::size_t i = 0; i < keys.shape(0); ++i) {
    const auto found = group_of.find(slots.data()[i]);
    require(found != group_of.end(), "a part is of an expert that no row wants");
    require(reads.has(keys.data()[i]) && parts.emplace(keys.data()[i], found->second).second, "a part's key is not one on its way");
  }
  FlashReads::Landed landed;
  nb::gil_scoped_release released;
  for (std::int64_t row = 0; row < rows; ++row) run.prepare(row);
  Arriving arriving(run, reads, parts);
  const int used = std::clamp(threads, 1, 256);
  run_phases(used, {used}, [&](int, std::int64_t, int thread) { arriving.take_part(thread == 0); });
  arriving.take_part(true);  // helpers that were quicker may have taken the caller's place
  reads.leave(&landed);
  if (arriving.is_whole())
    for (std::int64_t row = 0; row < rows; ++row) run.combine(row);
  return landed;
}

}  // namespace

void bind_arriving(nb::module_& m) { m.def("run_arriving", &run_arriving); }

}  // namespace edge
