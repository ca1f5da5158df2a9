// Parts of files on their way into memory, each checked against its digest before anybody is told that it is there.
//
// One thread asks, polls and waits; any may hash. A part is read in pieces, all at once, and what has come is hashed while
// the rest is still on its way. Whoever uses bytes before they are checked puts the checks off (`put_off`), and lets
// nothing out that came of them before `check` has said what was wrong.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "blake3.hpp"
#include "ring.hpp"

namespace edge {

constexpr int kPartRight = 0, kPartWrong = 1, kPartLeftOut = 2;  // what became of a part; below 0: an errno

// Of a thread that waits for flash, before it sleeps: what it waits for mostly comes sooner, and waking takes as long as
// hashing a piece does.
constexpr auto kFlashAwake = std::chrono::microseconds(500);

inline void pause_awake() {
#if defined(__x86_64__) || defined(_M_X64)
  for (int i = 0; i < 8; ++i) __builtin_ia32_pause();
#elif defined(__aarch64__)
  for (int i = 0; i < 8; ++i) __asm__ volatile("yield");
#endif
}

struct FlashPart;

// What is read in one go, and hashed on its own, by one thread or several.
struct FlashPiece {
  FlashPart* part;
  std::int64_t number, bytes;
  std::uint8_t* data;
  std::vector<std::uint32_t> values;
  std::atomic<std::int64_t> leaves;  // not hashed yet
};

struct FlashPart {
  std::int64_t key;
  int file;
  std::uint8_t* target;
  std::int64_t bytes, offset;
  std::uint8_t wanted[kBlake3DigestBytes];
  std::int64_t count = 0;                // of pieces
  std::unique_ptr<FlashPiece[]> pieces;
  std::vector<std::uint8_t> digests;     // of its pieces
  std::atomic<std::int64_t> missing;     // pieces that are neither hashed nor given up
  std::int64_t unread = 0;               // pieces
  std::int64_t group = 0;                // of whoever waits for it
  std::int64_t owner = 0;                // whose key it is
  int problem = kPartRight;
  bool is_done = false;
};

struct FlashLeaf {
  FlashPiece* piece;
  std::int64_t number;
};

// Where the time of layers with reads goes, in nanoseconds; anybody may add.
struct FlashTimes {
  std::atomic<std::int64_t> asking{0};     // system calls of the thread that asks
  std::atomic<std::int64_t> reading{0};    // from a layer's first read to its last byte
  std::atomic<std::int64_t> after{0};      // from its last byte to its result
  std::atomic<std::int64_t> hashing{0};    // of all threads
  std::atomic<std::int64_t> computing{0};  // of all threads

  static std::int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  static void add(std::atomic<std::int64_t>* to, std::int64_t from) { to->fetch_add(now() - from, std::memory_order_relaxed); }
};

// What a look brought: leaves to be hashed, parts of which every byte has come, parts that were lost.
struct FlashNews {
  std::vector<FlashLeaf> leaves;
  std::vector<FlashPart*> came, lost;
  void clear() { leaves.clear(), came.clear(), lost.clear(); }
};

class FlashReads {
 public:
  using Landed = std::vector<std::tuple<std::int64_t, int>>;  // (key, what became of it)

  explicit FlashReads(std::int64_t piece_bytes);
  ~FlashReads();

  // One part, which goes to `target`. `begin` comes first; the next `poll` begins to read.
  struct Wanted {
    std::int64_t key;
    int file;
    std::int64_t offset, bytes;
    std::uint8_t* target;
    const std::uint8_t* digest;
    std::int64_t group;
    std::int64_t owner = 0;
  };
  void ask(const Wanted& wanted);
  // What is asked for from now on goes somewhere in `memory`, and no cancelling from before is about it.
  void begin(Array<std::uint8_t, 1> memory);

  // places [n, 4]: key, file descriptor, offset in the file, bytes; each goes to `memory` from targets[n] on.
  void submit(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets,
              Array<const std::uint8_t, 2> digests);
  // One part at least, and all that are there already; [] where none is on its way.
  Landed land(int threads);
  // Reads and checks nothing: seconds until all is there. places and targets as for `submit`; nothing else may be on its
  // way. Throws std::runtime_error for what can't be read.
  double time_reads(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets);
  // Its first half: asks for all, unchecked, as nobody's.
  void ask_unchecked(Array<std::uint8_t, 1> memory, Array<const std::int64_t, 2> places, Array<const std::int64_t, 1> targets);
  // Its second half, when nothing is on its way any more.
  void leave_unchecked();
  // What has not begun is not read; what is under way is waited for. All parts are forgotten.
  void give_up();
  // From any thread: what has not begun is not read, and comes as left out. Until the next `submit`.
  void cancel() { is_cancelled_.store(true, std::memory_order_relaxed); }
  FlashTimes& times() { return times_; }
  double waited_seconds() const { return waited_seconds_; }
  std::int64_t parts() const { return static_cast<std::int64_t>(parts_.size()); }
  bool has(std::int64_t key) const {
    return std::any_of(parts_.begin(), parts_.end(), [&](const auto& part) { return part->key == key; });
  }

  // ---- for those who do the work themselves, without the interpreter's lock
  // What has come since is added to `news`; what was asked for begins.
  void poll(FlashNews* news);
  template <typename Visit>
  void for_each(const Visit& visit) {
    for (const auto& part : parts_) visit(*part);
  }
  // From any thread. The part, where this was the last that it missed.
  static FlashPart* hash(const FlashLeaf& leaf);
  bool is_waiting() const { return flying_ || !waiting_.empty(); }
  // Asleep until something has come.
  void wait() { ring_.wait(); }
  void waited(std::chrono::steady_clock::duration time) { waited_seconds_ += std::chrono::duration<double>(time).count(); }
  // Takes out what is done.
  void leave(Landed* landed);
  // With the interpreter's lock, after the last `leave`.
  void forget_memory() {
    if (parts_.empty() && unchecked_.empty()) memory_.clear();
  }

  // ---- checks that are made later
  // What was put off so far, for who has time for it and gives back what is left.
  std::deque<FlashLeaf> take_put_off() { return std::exchange(put_off_, {}); }
  void put_back(std::deque<FlashLeaf> leaves) { put_off_ = std::move(leaves); }
  // `leaves` are not hashed yet; all parts have come, and are here no more.
  void put_off(std::deque<FlashLeaf> leaves);
  // Whether somebody must not write there yet.
  bool is_unchecked(const std::uint8_t* from, std::int64_t bytes) const;
  // Makes all checks that were put off. Those of parts that `put_off` took away are reported by `check`.
  void hash_put_off(int threads);
  // Makes all checks that were put off: (owner, key, what became of it) of parts that are not right.
  std::vector<std::tuple<std::int64_t, std::int64_t, int>> check(int threads);

 private:
  void feed();
  static FlashPart* brought(FlashPart* part);

  Ring ring_;
  const std::int64_t piece_bytes_;
  std::deque<FlashPiece*> waiting_;  // not begun
  std::int64_t flying_ = 0;          // pieces
  std::vector<std::unique_ptr<FlashPart>> parts_;      // in the order asked for
  std::vector<std::unique_ptr<FlashPart>> unchecked_;  // all bytes have come, and may be in use
  std::deque<FlashLeaf> put_off_;
  std::vector<Array<std::uint8_t, 1>> memory_;       // stays where it is while something is on its way into it
  std::atomic<bool> is_cancelled_{false};
  double waited_seconds_ = 0.0;
  FlashTimes times_;
};

}  // namespace edge
