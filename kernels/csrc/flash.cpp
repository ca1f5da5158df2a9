#include "flash.hpp"

#include <algorithm>
#include <chrono>
#include <mutex>

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "parallel.hpp"

namespace edge {
namespace {

constexpr unsigned kInFlight = 64;  // reads: more than flash needs to be busy, few enough to give up soon
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

}  // namespace

FlashReads::FlashReads(std::int64_t piece_bytes) : ring_(kInFlight), piece_bytes_(piece_bytes) {
  require(piece_bytes > 0 && piece_bytes % kGrain == 0, "pieces are multiples of 2 KiB");
}

FlashReads::~FlashReads() {
  waiting_.clear();
  std::vector<FlashLeaf> leaves;
  std::vector<FlashPart*> failed;
  for (poll(&leaves, &failed); is_waiting(); poll(&leaves, &failed)) ring_.wait();
}

void FlashReads::submit(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places,
                        Array<const std::int64_t, 1> targets, Array<const std::uint8_t, 2> digests) {
  const std::size_t count = places.shape(0);
  require(places.shape(1) == 4 && targets.shape(0) == count && digests.shape(0) == count &&
              digests.shape(1) == kBlake3DigestBytes,
          "every part needs a place, a target and a digest");
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t bytes = places.data()[4 * i + 3], target = targets.data()[i], size = static_cast<std::int64_t>(memory.size());
    require(bytes > 0 && bytes % kGrain == 0 && target >= 0 && bytes <= size && target <= size - bytes &&
                places.data()[4 * i + 2] >= 0,
            "a part must fit into its memory, and be a multiple of 2 KiB");
  }
  memory_.push_back(memory);
  is_cancelled_.store(false, std::memory_order_relaxed);
  nb::gil_scoped_release released;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t* place = places.data() + 4 * i;
    auto part = std::make_unique<FlashPart>();
    part->key = place[0];
    part->file = static_cast<int>(place[1]);
    part->offset = place[2];
    part->bytes = place[3];
    part->target = memory.data() + targets.data()[i];
    std::copy_n(digests.data() + i * kBlake3DigestBytes, kBlake3DigestBytes, part->wanted);
    const std::int64_t pieces = (part->bytes + piece_bytes_ - 1) / piece_bytes_;
    part->missing.store(pieces, std::memory_order_relaxed);
    part->digests.resize(static_cast<std::size_t>(pieces) * kBlake3DigestBytes);
    for (std::int64_t number = 0; number < pieces; ++number) {
      auto piece = std::make_unique<FlashPiece>();
      piece->part = part.get();
      piece->number = number;
      piece->stride = piece_bytes_;
      piece->bytes = std::min(piece_bytes_, part->bytes - number * piece_bytes_);
      waiting_.push_back(std::move(piece));
    }
    parts_.push_back(std::move(part));
  }
  feed();
}

FlashReads::Landed FlashReads::land(int threads) {
  Landed landed;
  {
    nb::gil_scoped_release released;
    std::mutex mutex;
    std::vector<FlashLeaf> leaves;
    std::vector<FlashPart*> done;
    while (!parts_.empty() && done.empty()) {
      poll(&leaves, &done);
      if (leaves.empty() && done.empty()) {
        const auto start = std::chrono::steady_clock::now();
        while (!ring_.is_ready() && std::chrono::steady_clock::now() - start < kFlashAwake) pause_awake();
        if (!ring_.is_ready()) wait();
        waited(std::chrono::steady_clock::now() - start);
        continue;
      }
      const auto count = static_cast<std::int64_t>(leaves.size());
      run_phases(threads_worth(threads, count, 1), {count}, [&](int, std::int64_t item, int) {
        FlashPart* part = hash(leaves[static_cast<std::size_t>(item)]);
        if (!part) return;
        const std::lock_guard<std::mutex> lock(mutex);
        done.push_back(part);
      });
      leaves.clear();
    }
    for (FlashPart* part : done) part->is_done = true;
    leave(&landed);
  }
  if (parts_.empty()) memory_.clear();
  return landed;
}

void FlashReads::give_up() {
  {
    nb::gil_scoped_release released;
    std::vector<FlashLeaf> leaves;
    std::vector<FlashPart*> failed;
    waiting_.clear();
    for (poll(&leaves, &failed); is_waiting(); poll(&leaves, &failed)) ring_.wait();
    here_.clear();
    parts_.clear();
  }
  memory_.clear();
}

void FlashReads::poll(std::vector<FlashLeaf>* leaves, std::vector<FlashPart*>* failed) {
  const auto lost = [&](FlashPart* part, int problem) {
    part->problem = problem;
    if (brought(part)) failed->push_back(part);
  };
  for (Completion done; ring_.take(&done);) {
    const auto* piece = reinterpret_cast<const FlashPiece*>(done.key);
    const auto found = std::find_if(flying_.begin(), flying_.end(), [&](const auto& own) { return own.get() == piece; });
    if (found == flying_.end()) continue;  // never
    here_.push_back(std::move(*found));
    *found = std::move(flying_.back());
    flying_.pop_back();
    FlashPiece& own = *here_.back();
    if (done.result != own.bytes) {
      lost(own.part, done.result < 0 ? done.result : kPartWrong);
      continue;
    }
    const std::int64_t count = blake3_leaves(own.bytes);
    own.values.resize(static_cast<std::size_t>(count) * 8);
    own.leaves.store(count, std::memory_order_relaxed);
    for (std::int64_t leaf = 0; leaf < count; ++leaf) leaves->push_back({&own, leaf});
  }
  if (is_cancelled_.load(std::memory_order_relaxed))
    for (; !waiting_.empty(); waiting_.pop_front()) lost(waiting_.front()->part, kPartLeftOut);
  feed();
}

FlashPart* FlashReads::hash(const FlashLeaf& leaf) {
  FlashPiece& piece = *leaf.piece;
  blake3_leaf(piece.data(), piece.bytes, leaf.number, piece.values.data());
  if (piece.leaves.fetch_sub(1, std::memory_order_acq_rel) != 1) return nullptr;
  blake3_finish(piece.data(), piece.bytes, piece.values.data(), piece.part->digests.data() + piece.number * kBlake3DigestBytes);
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
  if (parts_.empty()) here_.clear();
}

void FlashReads::feed() {
  bool any = false;
  for (; !waiting_.empty(); waiting_.pop_front(), any = true) {
    FlashPiece& piece = *waiting_.front();
    if (!ring_.read(piece.part->file, piece.data(), static_cast<std::uint32_t>(piece.bytes),
                    static_cast<std::uint64_t>(piece.part->offset + piece.number * piece_bytes_),
                    reinterpret_cast<std::uint64_t>(&piece)))
      break;
    flying_.push_back(std::move(waiting_.front()));
  }
  if (any) ring_.submit();
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
      .def("give_up", &FlashReads::give_up)
      .def("cancel", &FlashReads::cancel)
      .def_prop_ro("waited_seconds", &FlashReads::waited_seconds)
      .def_prop_ro("parts", &FlashReads::parts);
  m.def("blake3", &hash_bytes);
}

}  // namespace edge
