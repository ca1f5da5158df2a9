// Parts of files on their way into memory, each checked against its digest before anybody is told that it is there.
//
// One thread asks and waits; helper threads share the hashing. A part is read in pieces, and what has come is hashed
// while the rest is still on its way.
#include <chrono>
#include <deque>
#include <memory>
#include <tuple>
#include <vector>

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "arrays.hpp"
#include "blake3.hpp"
#include "parallel.hpp"
#include "ring.hpp"

namespace edge {
namespace {

constexpr unsigned kInFlight = 64;  // reads: more than flash needs to be busy, few enough to give up soon
constexpr std::int64_t kGrain = 2 * kBlake3ChunkBytes;
constexpr int kRight = 0, kWrong = 1, kLeftOut = 2;  // what became of a part; below 0: an errno

struct Part {
  std::int64_t key;
  int file;
  std::uint8_t* target;
  std::int64_t bytes, offset;
  std::uint8_t wanted[kBlake3DigestBytes];
  std::vector<std::uint8_t> digests;  // of its pieces
  std::int64_t missing;               // pieces
  int problem = kRight;
};

struct Piece {
  Part* part;
  std::int64_t number;
  std::vector<std::uint32_t> values;
  std::int64_t bytes;
  std::uint8_t* data() const { return part->target + number * stride; }
  std::int64_t stride;
};

class FlashReads {
 public:
  explicit FlashReads(std::int64_t piece_bytes) : ring_(kInFlight), piece_bytes_(piece_bytes) {
    require(piece_bytes > 0 && piece_bytes % kGrain == 0, "pieces are multiples of 2 KiB");
  }
  ~FlashReads() {
    waiting_.clear();
    drain();
  }

  // places [n, 4]: key, file descriptor, offset in the file, bytes; each goes to `memory` from targets[n] on.
  void submit(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets,
              Array<const std::uint8_t, 2> digests) {
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
    nb::gil_scoped_release released;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t* place = places.data() + 4 * i;
      auto part = std::make_unique<Part>();
      part->key = place[0];
      part->file = static_cast<int>(place[1]);
      part->offset = place[2];
      part->bytes = place[3];
      part->target = memory.data() + targets.data()[i];
      std::copy_n(digests.data() + i * kBlake3DigestBytes, kBlake3DigestBytes, part->wanted);
      part->missing = (part->bytes + piece_bytes_ - 1) / piece_bytes_;
      part->digests.resize(static_cast<std::size_t>(part->missing) * kBlake3DigestBytes);
      for (std::int64_t number = 0; number < part->missing; ++number) {
        auto piece = std::make_unique<Piece>();
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

  // (key, what became of it) of one part at least, and of all that are there already; [] where none is on its way.
  std::vector<std::tuple<std::int64_t, int>> land(int threads) {
    std::vector<std::tuple<std::int64_t, int>> landed;
    {
      nb::gil_scoped_release released;
      while (landed.empty() && !parts_.empty()) {
        std::vector<std::unique_ptr<Piece>> here = collect();
        if (here.empty() && !flying_.empty()) wait();
        feed();
        hash(here, threads);
        leave(landed);
      }
    }
    if (parts_.empty()) memory_.clear();
    return landed;
  }

  // What has not begun is not read; what is under way is waited for. All parts are forgotten.
  void give_up() {
    {
      nb::gil_scoped_release released;
      waiting_.clear();
      drain();
      parts_.clear();
    }
    memory_.clear();
  }

  double waited_seconds() const { return waited_seconds_; }
  std::int64_t parts() const { return static_cast<std::int64_t>(parts_.size()); }

 private:
  void feed() {
    bool any = false;
    for (; !waiting_.empty(); waiting_.pop_front(), any = true) {
      Piece* piece = waiting_.front().get();
      if (!ring_.read(piece->part->file, piece->data(), static_cast<std::uint32_t>(piece->bytes),
                      static_cast<std::uint64_t>(piece->part->offset + piece->number * piece_bytes_),
                      reinterpret_cast<std::uint64_t>(piece)))
        break;
      flying_.push_back(std::move(waiting_.front()));
    }
    if (any) ring_.submit();
  }

  void wait() {
    const auto start = std::chrono::steady_clock::now();
    ring_.wait();
    waited_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  // Pieces that came whole; others are noted at their parts.
  std::vector<std::unique_ptr<Piece>> collect() {
    std::vector<std::unique_ptr<Piece>> here;
    for (Completion done; ring_.take(&done);) {
      const auto* piece = reinterpret_cast<const Piece*>(done.key);
      const auto found = std::find_if(flying_.begin(), flying_.end(), [&](const auto& own) { return own.get() == piece; });
      if (found == flying_.end()) continue;  // never
      std::unique_ptr<Piece> own = std::move(*found);
      *found = std::move(flying_.back());
      flying_.pop_back();
      if (done.result == own->bytes) {
        here.push_back(std::move(own));
        continue;
      }
      own->part->problem = done.result < 0 ? done.result : kWrong;
      --own->part->missing;
    }
    return here;
  }

  void hash(const std::vector<std::unique_ptr<Piece>>& pieces, int threads) const {
    struct Leaf {
      Piece* piece;
      std::int64_t number;
    };
    std::vector<Leaf> leaves;
    for (const auto& piece : pieces) {
      const std::int64_t count = blake3_leaves(piece->bytes);
      piece->values.resize(static_cast<std::size_t>(count) * 8);
      for (std::int64_t leaf = 0; leaf < count; ++leaf) leaves.push_back({piece.get(), leaf});
    }
    const auto parts = static_cast<std::int64_t>(leaves.size());
    run_phases(threads_worth(threads, parts, 1), {parts, static_cast<std::int64_t>(pieces.size())},
               [&](int phase, std::int64_t item, int) {
                 if (phase == 0) {
                   const Leaf& leaf = leaves[static_cast<std::size_t>(item)];
                   return blake3_leaf(leaf.piece->data(), leaf.piece->bytes, leaf.number, leaf.piece->values.data());
                 }
                 Piece& own = *pieces[static_cast<std::size_t>(item)];
                 blake3_finish(own.data(), own.bytes, own.values.data(), own.part->digests.data() + own.number * kBlake3DigestBytes);
               });
    for (const auto& piece : pieces) --piece->part->missing;
  }

  // Those that miss nothing any more.
  void leave(std::vector<std::tuple<std::int64_t, int>>& landed) {
    for (std::size_t i = 0; i < parts_.size();) {
      Part& part = *parts_[i];
      if (part.missing) {
        ++i;
        continue;
      }
      if (part.problem == kRight && !is_right(part)) part.problem = kWrong;
      landed.emplace_back(part.key, part.problem);
      parts_.erase(parts_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  // The digest of a part is that of its only piece, or of the digests of its pieces (bundle/hashing.py).
  static bool is_right(const Part& part) {
    std::uint8_t whole[kBlake3DigestBytes];
    const std::uint8_t* digest = part.digests.data();
    if (part.digests.size() > kBlake3DigestBytes) {
      blake3_short(part.digests.data(), part.digests.size(), whole);
      digest = whole;
    }
    return std::equal(digest, digest + kBlake3DigestBytes, part.wanted);
  }

  void drain() {
    while (!flying_.empty()) {
      if (collect().empty() && !flying_.empty()) ring_.wait();
    }
  }

  Ring ring_;
  const std::int64_t piece_bytes_;
  std::deque<std::unique_ptr<Piece>> waiting_;   // not asked for yet
  std::vector<std::unique_ptr<Piece>> flying_;
  std::vector<std::unique_ptr<Part>> parts_;     // in the order asked for
  std::vector<Array<std::uint8_t, 1>> memory_;   // stays where it is while something is on its way into it
  double waited_seconds_ = 0.0;
};

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
      .def_prop_ro("waited_seconds", &FlashReads::waited_seconds)
      .def_prop_ro("parts", &FlashReads::parts);
  m.def("blake3", &hash_bytes);
}

}  // namespace edge
