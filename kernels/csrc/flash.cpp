#include "flash.hpp"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <stdexcept>

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "parallel.hpp"

namespace edge {
namespace {

// Reads: as many as flash needs to be busy. The block device of a virtual machine often tells of what it has read when it
// has nothing more to read, so more at a time means that the processors wait for all of them, then flash for the processors.
constexpr unsigned kInFlight = 8;
constexpr std::int64_t kGrain = 2 * kBlake3ChunkBytes;

// The digest of a part is that of its only piece, or of the digests of its pieces (bundle/hashing.py).
bool is_right(const FlashPart& part) {
  std::uint8_t whole[kBlake3DigestBytes];
  const std::uint8_t* digest = part.digests.data();
  if (part.digests.size() > kBlake3DigestBytes) {
    blake3_short(part.digests.data(), part.digests.size(), whole);
    digest = whole;
  }
  return std::equal(digest, digest + kBlake3DigestBytes, part.wanted);
}

void check_places(const Array<std::uint8_t, 1>& memory, const Array<const std::int64_t, 2>& places,
                  const Array<const std::int64_t, 1>& targets) {
  const std::size_t count = places.shape(0);
  require(places.shape(1) == 4 && targets.shape(0) == count, "every part needs a place and a target");
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t bytes = places.data()[4 * i + 3], target = targets.data()[i], size = static_cast<std::int64_t>(memory.size());
    require(bytes > 0 && bytes % kGrain == 0 && target >= 0 && bytes <= size && target <= size - bytes &&
                places.data()[4 * i + 2] >= 0,
            "a part must fit into its memory, and be a multiple of 2 KiB");
  }
}

}  // namespace

FlashReads::FlashReads(std::int64_t piece_bytes) : ring_(kInFlight), piece_bytes_(piece_bytes) {
  require(piece_bytes > 0 && piece_bytes % kGrain == 0, "pieces are multiples of 2 KiB");
}

FlashReads::~FlashReads() {
  waiting_.clear();
  FlashNews news;
  for (poll(&news); is_waiting(); poll(&news)) ring_.wait();
}

void FlashReads::submit(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places,
                        Array<const std::int64_t, 1> targets, Array<const std::uint8_t, 2> digests) {
  const std::size_t count = places.shape(0);
  require(digests.shape(0) == count && digests.shape(1) == kBlake3DigestBytes, "every part needs a digest");
  check_places(memory, places, targets);
  begin(memory);
  nb::gil_scoped_release released;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t* place = places.data() + 4 * i;
    ask({place[0], static_cast<int>(place[1]), place[2], place[3], memory.data() + targets.data()[i],
         digests.data() + i * kBlake3DigestBytes, 0});
  }
  feed();
}

void FlashReads::begin(Array<std::uint8_t, 1> memory) {
  memory_.push_back(std::move(memory));
  is_cancelled_.store(false, std::memory_order_relaxed);
}

void FlashReads::ask(const Wanted& wanted) {
  auto part = std::make_unique<FlashPart>();
  part->key = wanted.key;
  part->file = wanted.file;
  part->offset = wanted.offset;
  part->bytes = wanted.bytes;
  part->target = wanted.target;
  std::copy_n(wanted.digest, kBlake3DigestBytes, part->wanted);
  part->count = (part->bytes + piece_bytes_ - 1) / piece_bytes_;
  part->group = wanted.group;
  part->owner = wanted.owner;
  part->unread = part->count;
  part->missing.store(part->count, std::memory_order_relaxed);
  part->digests.resize(static_cast<std::size_t>(part->count) * kBlake3DigestBytes);
  part->pieces.reset(new FlashPiece[static_cast<std::size_t>(part->count)]);
  for (std::int64_t number = 0; number < part->count; ++number) {
    FlashPiece& piece = part->pieces[static_cast<std::size_t>(number)];
    piece.part = part.get();
    piece.number = number;
    piece.data = part->target + number * piece_bytes_;
    piece.bytes = std::min(piece_bytes_, part->bytes - number * piece_bytes_);
    waiting_.push_back(&piece);
  }
  parts_.push_back(std::move(part));
}

FlashReads::Landed FlashReads::land(int threads) {
  Landed landed;
  {
    nb::gil_scoped_release released;
    std::mutex mutex;
    FlashNews news;
    std::vector<FlashPart*> done;
    while (!parts_.empty() && done.empty()) {
      news.clear();
      poll(&news);
      done = news.lost;
      if (news.leaves.empty() && done.empty()) {
        const auto start = std::chrono::steady_clock::now();
        while (!ring_.is_ready() && std::chrono::steady_clock::now() - start < kFlashAwake) pause_awake();
        if (!ring_.is_ready()) wait();
        waited(std::chrono::steady_clock::now() - start);
        continue;
      }
      const auto count = static_cast<std::int64_t>(news.leaves.size());
      run_phases(threads_worth(threads, count, 1), {count}, [&](int, std::int64_t item, int) {
        FlashPart* part = hash(news.leaves[static_cast<std::size_t>(item)]);
        if (!part) return;
        const std::lock_guard<std::mutex> lock(mutex);
        done.push_back(part);
      });
    }
    for (FlashPart* part : done) part->is_done = true;
    leave(&landed);
  }
  forget_memory();
  return landed;
}

void FlashReads::ask_unchecked(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets) {
  check_places(memory, places, targets);
  require(parts_.empty(), "other reads are on their way");
  constexpr std::uint8_t kUnchecked[kBlake3DigestBytes] = {};
  begin(memory);
  for (std::size_t i = 0; i < places.shape(0); ++i) {
    const std::int64_t* place = places.data() + 4 * i;
    ask({place[0], static_cast<int>(place[1]), place[2], place[3], memory.data() + targets.data()[i], kUnchecked, 0});
  }
}

void FlashReads::leave_unchecked() {
  const bool is_lost = std::any_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->unread != 0; });
  parts_.clear();
  forget_memory();
  if (is_lost) throw std::runtime_error("a part can't be read");
}

double FlashReads::time_reads(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets) {
  const std::int64_t start = FlashTimes::now();
  ask_unchecked(memory, places, targets);
  {
    nb::gil_scoped_release released;
    FlashNews news;
    for (poll(&news); is_waiting(); poll(&news)) {
      const auto idle = std::chrono::steady_clock::now();
      while (!ring_.is_ready() && std::chrono::steady_clock::now() - idle < kFlashAwake) pause_awake();
      if (!ring_.is_ready()) wait();
    }
  }
  const std::int64_t end = FlashTimes::now();
  leave_unchecked();
  return 1e-9 * static_cast<double>(end - start);
}

void FlashReads::give_up() {
  {
    nb::gil_scoped_release released;
    FlashNews news;
    waiting_.clear();
    for (poll(&news); is_waiting(); poll(&news)) ring_.wait();
    parts_.clear();
  }
  forget_memory();
}

void FlashReads::poll(FlashNews* news) {
  const auto lost = [&](FlashPart* part, int problem) {
    part->problem = problem;
    if (brought(part)) news->lost.push_back(part);
  };
  for (Completion done; ring_.take(&done);) {
    FlashPiece& piece = *reinterpret_cast<FlashPiece*>(done.key);
    --flying_;
    if (done.result != piece.bytes) {
      lost(piece.part, done.result < 0 ? done.result : kPartWrong);
      continue;
    }
    const std::int64_t count = blake3_leaves(piece.bytes);
    piece.values.resize(static_cast<std::size_t>(count) * 8);
    piece.leaves.store(count, std::memory_order_relaxed);
    for (std::int64_t leaf = 0; leaf < count; ++leaf) news->leaves.push_back({&piece, leaf});
    if (--piece.part->unread == 0) news->came.push_back(piece.part);
  }
  if (is_cancelled_.load(std::memory_order_relaxed))
    for (; !waiting_.empty(); waiting_.pop_front()) lost(waiting_.front()->part, kPartLeftOut);
  feed();
}

FlashPart* FlashReads::hash(const FlashLeaf& leaf) {
  FlashPiece& piece = *leaf.piece;
  blake3_leaf(piece.data, piece.bytes, leaf.number, piece.values.data());
  if (piece.leaves.fetch_sub(1, std::memory_order_acq_rel) != 1) return nullptr;
  blake3_finish(piece.data, piece.bytes, piece.values.data(), piece.part->digests.data() + piece.number * kBlake3DigestBytes);
  return brought(piece.part);
}

FlashPart* FlashReads::brought(FlashPart* part) {
  if (part->missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return nullptr;
  if (part->problem == kPartRight && !is_right(*part)) part->problem = kPartWrong;
  return part;
}

void FlashReads::leave(Landed* landed) {
  for (const auto& part : parts_)
    if (part->is_done) landed->emplace_back(part->key, part->problem);
  const auto gone = std::remove_if(parts_.begin(), parts_.end(), [](const auto& part) { return part->is_done; });
  parts_.erase(gone, parts_.end());
}

void FlashReads::put_off(std::deque<FlashLeaf> leaves) {
  put_off_ = std::move(leaves);
  for (auto& part : parts_)
    if (!part->is_done || part->problem != kPartRight) unchecked_.push_back(std::move(part));
  parts_.clear();
}

bool FlashReads::is_unchecked(const std::uint8_t* from, std::int64_t bytes) const {
  return std::any_of(unchecked_.begin(), unchecked_.end(), [&](const auto& part) {
    return !part->is_done && part->target < from + bytes && from < part->target + part->bytes;
  });
}

void FlashReads::hash_put_off(int threads) {
  const auto count = static_cast<std::int64_t>(put_off_.size());
  run_phases(threads_worth(threads, count, 1), {count}, [&](int, std::int64_t item, int) {
    if (FlashPart* part = hash(put_off_[static_cast<std::size_t>(item)])) part->is_done = true;
  });
  put_off_.clear();
}

std::vector<std::tuple<std::int64_t, std::int64_t, int>> FlashReads::check(int threads) {
  std::vector<std::tuple<std::int64_t, std::int64_t, int>> wrong;
  {
    nb::gil_scoped_release released;
    hash_put_off(threads);
    for (const auto& part : unchecked_)
      if (part->problem != kPartRight) wrong.emplace_back(part->owner, part->key, part->problem);
    unchecked_.clear();
  }
  forget_memory();
  return wrong;
}

void FlashReads::feed() {
  bool any = false;
  for (; !waiting_.empty(); waiting_.pop_front(), ++flying_, any = true) {
    FlashPiece& piece = *waiting_.front();
    if (!ring_.read(piece.part->file, piece.data, static_cast<std::uint32_t>(piece.bytes),
                    static_cast<std::uint64_t>(piece.part->offset + piece.number * piece_bytes_),
                    reinterpret_cast<std::uint64_t>(&piece)))
      break;
  }
  if (!any) return;
  const std::int64_t start = FlashTimes::now();
  ring_.submit();
  FlashTimes::add(&times_.asking, start);
}

namespace {

void hash_bytes(Array<const std::uint8_t, 1> data, Array<std::uint8_t, 1> digest, int threads) {
  require(digest.shape(0) == kBlake3DigestBytes, "a digest has 32 bytes");
  const auto bytes = static_cast<std::int64_t>(data.size());
  nb::gil_scoped_release released;
  if (bytes < kGrain || bytes % kBlake3ChunkBytes) return blake3_short(data.data(), data.size(), digest.data());
  const std::int64_t leaves = blake3_leaves(bytes);
  std::vector<std::uint32_t> values(static_cast<std::size_t>(leaves) * 8);
  run_phases(threads_worth(threads, leaves, 1), {leaves},
             [&](int, std::int64_t leaf, int) { blake3_leaf(data.data(), bytes, leaf, values.data()); });
  blake3_finish(data.data(), bytes, values.data(), digest.data());
}

}  // namespace

void bind_flash(nb::module_& m) {
  nb::class_<FlashReads>(m, "FlashReads")
      .def(nb::init<std::int64_t>())
      .def("submit", &FlashReads::submit)
      .def("land", &FlashReads::land)
      .def("time_reads", &FlashReads::time_reads)
      .def("give_up", &FlashReads::give_up)
      .def("check", &FlashReads::check)
      .def("cancel", &FlashReads::cancel)
      .def_prop_ro("waited_seconds", &FlashReads::waited_seconds)
      .def_prop_ro("times", [](FlashReads& reads) {
        const FlashTimes& times = reads.times();
        return std::make_tuple(times.asking.load(), times.reading.load(), times.after.load(), times.hashing.load(), times.computing.load());
      })
      .def_prop_ro("parts", &FlashReads::parts);
  m.def("blake3", &hash_bytes);
}

}  // namespace edge
