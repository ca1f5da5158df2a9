#include "experts_arriving.hpp"

#include <unordered_map>

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

namespace edge {

using namespace expert_layer;

namespace {

// Of helpers. One that leaves does not come back before the layer is done, so it is long: only flash that stalls, for a
// moment of which one thread more or less makes no difference, outlasts it.
constexpr auto kHelperAwake = std::chrono::milliseconds(20);

}  // namespace

Arriving::Arriving(const Run& run, FlashReads& reads, bool checks_later)
    : run_(run), reads_(reads), checks_later_(checks_later), groups_(run.groups().size()), coming_(reads.parts()),
      open_(static_cast<std::int64_t>(groups_.size()) + reads.parts()) {
  if (checks_later) checks_ = reads.take_put_off();
  reads.for_each([&](const FlashPart& part) { ++state(part.group).missing; });
  for (std::size_t group = 0; group < groups_.size(); ++group)
    if (!groups_[group].missing) add(Kind::inner, static_cast<std::int64_t>(group), run_.inner_chunks());
}

void Arriving::operator()(int threads) {
  const int used = std::clamp(threads, 1, 256);
  run_phases(used, {used}, [&](int, std::int64_t, int thread) { take_part(thread == 0); });
  take_part(true);  // helpers that were quicker may have taken the caller's place
  if (all_came_) {
    reads_.times().reading.fetch_add(all_came_ - begun_, std::memory_order_relaxed);
    FlashTimes::add(&reads_.times().after, all_came_);
  }
  if (!failed_ || !checks_later_) return;
  reads_.put_back(leave_checks());
  reads_.hash_put_off(threads);
}

// Without the caller helpers leave when there is nothing to do; with it when all is done.
void Arriving::take_part(bool is_caller) {
  if (is_caller) is_looked_after_.store(true, std::memory_order_relaxed);
  for (Work work; next(&work, is_caller);) {
    const std::int64_t start = FlashTimes::now();
    if (work.kind != Kind::hash) {
      compute(work);
      FlashTimes::add(&reads_.times().computing, start);
      continue;
    }
    if (FlashPart* part = FlashReads::hash(work.leaf)) checked(part);
    FlashTimes::add(&reads_.times().hashing, start);
  }
}

void Arriving::compute(const Work& work) {
  const Group& group = run_.group(work.group);
  if (work.kind == Kind::inner)
    run_.gate_and_up(group, work.chunk * kChunk);
  else
    run_.down(group, work.chunk * kChunk);
  if (state(work.group).chunks.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (work.kind == Kind::inner)
    add(Kind::outer, work.group, run_.outer_chunks());
  else
    open_.fetch_sub(1, std::memory_order_release);
}

void Arriving::add(Kind kind, std::int64_t group, std::int64_t chunks) {
  state(group).chunks.store(chunks, std::memory_order_relaxed);
  const std::lock_guard<Spin> lock(spin_);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) work_.push_back({kind, group, chunk, {}});
  count_.store(work_.size() + checks_.size(), std::memory_order_release);
}

// Of the calling thread: all bytes are there, and may still turn out wrong.
void Arriving::came(FlashPart* part) {
  State& own = state(part->group);
  bool is_next = false;
  {
    const std::lock_guard<Spin> lock(spin_);
    is_next = !--own.missing && !own.is_lost;
  }
  if (coming_.fetch_sub(1, std::memory_order_relaxed) == 1) all_came_ = FlashTimes::now();
  if (is_next) add(Kind::inner, part->group, run_.inner_chunks());
  if (checks_later_) open_.fetch_sub(1, std::memory_order_release);
}

// All of a part that came is hashed. With checks put off it may be of an earlier layer, and be wrong: that is said later.
void Arriving::checked(FlashPart* part) {
  if (!checks_later_ || part->unread) return settled(part);
  const std::lock_guard<Spin> lock(spin_);
  part->is_done = true;
}

// A part is right, wrong or given up.
void Arriving::settled(FlashPart* part) {
  State& own = state(part->group);
  bool is_lost = false;  // with it a group that will never be computed
  {
    const std::lock_guard<Spin> lock(spin_);
    part->is_done = true;
    if (part->problem != kPartRight) {
      failed_ = true;
      is_lost = own.missing && !own.is_lost;
      own.is_lost = own.is_lost || is_lost;
    }
  }
  open_.fetch_sub(is_lost ? 2 : 1, std::memory_order_release);
}

bool Arriving::next(Work* work, bool is_caller) {
  const auto start = std::chrono::steady_clock::now();
  bool waits = false;  // for flash
  const auto leave = [&](bool found) {
    if (waits) reads_.waited(std::chrono::steady_clock::now() - start);
    return found;
  };
  while (true) {
    if (is_caller) look();
    if (count_.load(std::memory_order_acquire) && take(work)) return leave(true);
    if (!open_.load(std::memory_order_acquire)) return leave(false);
    pause_awake();
    const auto idle = std::chrono::steady_clock::now() - start;
    if (!is_caller && (idle > kHelperAwake || !is_looked_after_.load(std::memory_order_relaxed))) return false;
    if (!is_caller || !reads_.is_waiting()) continue;
    waits = true;
    if (idle > kFlashAwake) reads_.wait();
  }
}

// Checks that were put off are for the time that is spent waiting for flash: products alone are sooner done without them.
bool Arriving::take(Work* work) {
  const std::lock_guard<Spin> lock(spin_);
  if (!work_.empty()) {
    *work = work_.front();
    work_.pop_front();
  } else if (!checks_.empty() && coming_.load(std::memory_order_relaxed) > 0) {
    *work = {Kind::hash, 0, 0, checks_.front()};
    checks_.pop_front();
  } else {
    return false;
  }
  count_.store(work_.size() + checks_.size(), std::memory_order_relaxed);
  return true;
}

void Arriving::look() {
  if (!reads_.is_waiting()) return;
  reads_.poll(&news_);
  for (FlashPart* part : news_.came) came(part);
  if (!news_.leaves.empty()) {
    const std::lock_guard<Spin> lock(spin_);
    if (checks_later_)
      checks_.insert(checks_.end(), news_.leaves.begin(), news_.leaves.end());
    else
      for (auto leaf = news_.leaves.rbegin(); leaf != news_.leaves.rend(); ++leaf) work_.push_front({Kind::hash, 0, 0, *leaf});
    count_.store(work_.size() + checks_.size(), std::memory_order_release);
  }
  for (FlashPart* part : news_.lost) settled(part);
  news_.clear();
}

namespace {

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
  reads.for_each([&](FlashPart& part) { part.group = parts.at(part.key); });
  FlashReads::Landed landed;
  {
    nb::gil_scoped_release released;
    for (std::int64_t row = 0; row < rows; ++row) run.prepare(row);
    Arriving arriving(run, reads);
    arriving(threads);
    reads.leave(&landed);
    if (arriving.is_whole())
      for (std::int64_t row = 0; row < rows; ++row) run.combine(row);
  }
  reads.forget_memory();
  return landed;
}

// `time_reads` while all threads compute some experts: what flash gives whoever has hits to compute meanwhile. The calling
// thread looks after the reads between two items of work, as in `Arriving`; nothing is checked.
double time_reads_beside(FlashReads& reads, Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places,
                         Array<const std::int64_t, 1> targets, Array<const float, 2> x, Array<const std::int32_t, 2> ids,
                         Array<const float, 2> gates, Array<const std::uint8_t, 1> buffer, const std::string& format,
                         std::int64_t experts, std::int64_t hidden, std::int64_t intermediate, std::int64_t stride_bytes,
                         Array<const std::int64_t, 1> offsets, Array<float, 2> y, int threads) {
  const Layer layer = checked_layer(buffer, format, experts, hidden, intermediate, stride_bytes, offsets);
  check_rows(layer, x, ids, gates, y);
  const auto rows = static_cast<std::int64_t>(x.shape(0)), top_k = static_cast<std::int64_t>(ids.shape(1));
  const std::int64_t start = FlashTimes::now();
  std::int64_t end = 0;
  reads.ask_unchecked(memory, places, targets);
  {
    nb::gil_scoped_release released;
    const Run run(layer, x.data(), ids.data(), gates.data(), y.data(), rows, top_k);
    for (std::int64_t row = 0; row < rows; ++row) run.prepare(row);
    FlashNews news;
    const auto look = [&] {
      if (end) return;
      reads.poll(&news);
      if (!reads.is_waiting()) end = FlashTimes::now();
    };
    look();
    const auto groups = static_cast<std::int64_t>(run.groups().size());
    const std::int64_t inner = run.inner_chunks(), outer = run.outer_chunks();
    run_phases(std::clamp(threads, 1, 256), {groups * inner, groups * outer}, [&](int phase, std::int64_t item, int thread) {
      if (thread == 0) look();
      if (phase == 0) run.gate_and_up(run.group(item / inner), item % inner * kChunk);
      if (phase == 1) run.down(run.group(item / outer), item % outer * kChunk);
    });
    for (auto idle = std::chrono::steady_clock::now(); !end; look()) {
      pause_awake();
      if (std::chrono::steady_clock::now() - idle > kFlashAwake) reads.wait();
    }
  }
  reads.leave_unchecked();
  return 1e-9 * static_cast<double>(end - start);
}

}  // namespace

void bind_arriving(nb::module_& m) {
  m.def("run_arriving", &run_arriving);
  m.def("time_reads_beside", &time_reads_beside);
}

}  // namespace edge
