// Helper threads of the process. They wait for work awake for a moment, since a step may be many short calls, then
// asleep.
//
// Each thread has a stretch of its own in every phase, so that it reads weights in one stream; whoever is done helps the
// others, and fetches what it reads next while it waits for them. A call never waits for a helper that has not begun,
// and helpers that come late find nothing left. Helpers hold no lock while they work, and the pool is never destroyed,
// so exit is safe; a forked child starts a pool of its own. A second caller at the same time works alone.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "parallel.hpp"

namespace edge {
namespace {

constexpr auto kAwake = std::chrono::microseconds(100);  // covers what Python does between two calls of a step, mostly
// Where call follows call, as in a step whose layers are called one by one, waking would be paid for again and again.
constexpr auto kAwakeInSteps = std::chrono::microseconds(300);
constexpr int kCallsOfSteps = 4;  // one soon after the other
constexpr int kPausesBeforeYield = 2000;
constexpr std::int64_t kAheadPieceBytes = 512;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct alignas(64) Stretch {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
};

struct alignas(64) Done {
  std::atomic<std::int64_t> count{0};
};

struct Job {
  Job(int threads_, std::vector<std::int64_t> items_, PhaseWork work_, const void* context_, std::vector<Ahead> ahead_)
      : items(std::move(items_)),
        threads(threads_),
        stretches(items.size() * static_cast<std::size_t>(threads)),
        done(items.size()),
        work(work_),
        context(context_),
        ahead(std::move(ahead_)),
        free_places(threads - 1) {
    for (std::size_t phase = 0; phase < items.size(); ++phase)
      for (int thread = 0; thread < threads; ++thread) {
        Stretch& mine = stretch(phase, thread);
        mine.next.store(first_item(items[phase], threads, thread), std::memory_order_relaxed);
        mine.end = first_item(items[phase], threads, thread + 1);
      }
  }

  Stretch& stretch(std::size_t phase, int thread) {
    return stretches[phase * static_cast<std::size_t>(threads) + static_cast<std::size_t>(thread)];
  }

  void take_part(int thread) {
    for (std::size_t phase = 0; phase < items.size(); ++phase) {
      std::int64_t taken = 0;
      for (int i = 0; i < threads; ++i) {
        Stretch& from = stretch(phase, (thread + i) % threads);
        for (std::int64_t item; (item = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end; ++taken)
          work(context, static_cast<int>(phase), item, thread);
      }
      if (taken) done[phase].count.fetch_add(taken, std::memory_order_release);
      wait(phase, thread);
    }
  }

  // Touches nothing of the caller's: a helper may still be here when the caller has gone.
  void wait(std::size_t phase, int thread) {
    const std::atomic<std::int64_t>& count = done[phase].count;
    Ahead next;
    if (!ahead.empty()) next = ahead[phase * static_cast<std::size_t>(threads) + static_cast<std::size_t>(thread)];
    for (int pauses = 0; count.load(std::memory_order_acquire) < items[phase];) {
      if (next.size_bytes > 0) {
        for (std::int64_t line = 0; line < kAheadPieceBytes; line += 64) __builtin_prefetch(next.data + line, 0, 2);
        next.data += kAheadPieceBytes;
        next.size_bytes -= kAheadPieceBytes;
      } else if (++pauses < kPausesBeforeYield) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  const std::vector<std::int64_t> items;
  const int threads;
  std::vector<Stretch> stretches;
  std::vector<Done> done;
  const PhaseWork work;
  const void* const context;  // of the caller: gone when it returns, which is after the last item
  const std::vector<Ahead> ahead;
  std::atomic<int> free_places;
};

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job, int threads) {
    const std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
    if (only.owns_lock()) {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      job_ = job;
      generation_.fetch_add(1, std::memory_order_release);
      if (asleep_ > 0) wake_.notify_all();
    }
    job->take_part(0);
  }

 private:
  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that started, and the caller, do the work.
    }
  }

  void help() {
    std::uint64_t seen = 0;
    for (int soon = 0;;) {
      const auto idle = std::chrono::steady_clock::now();
      const std::shared_ptr<Job> job = next_job(&seen, soon < kCallsOfSteps ? kAwake : kAwakeInSteps);
      soon = std::chrono::steady_clock::now() - idle < kAwakeInSteps ? soon + 1 : 0;
      const int place = job->free_places.fetch_sub(1, std::memory_order_relaxed);
      if (place > 0) job->take_part(place);
    }
  }

  std::shared_ptr<Job> next_job(std::uint64_t* seen, std::chrono::microseconds awake) {
    const auto until = std::chrono::steady_clock::now() + awake;
    while (generation_.load(std::memory_order_acquire) == *seen && std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 16; ++i) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != *seen; });
    --asleep_;
    *seen = generation_.load(std::memory_order_relaxed);
    return job_;
  }

  std::mutex caller_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<std::uint64_t> generation_{0};
  int helpers_ = 0;
  int asleep_ = 0;
};

std::atomic<Pool*> pool_of_process{nullptr};
std::mutex making;

Pool& pool() {
  if (Pool* pool = pool_of_process.load(std::memory_order_acquire)) return *pool;
  std::lock_guard<std::mutex> lock(making);
  if (Pool* pool = pool_of_process.load(std::memory_order_acquire)) return *pool;
#if defined(__unix__) || defined(__APPLE__)
  // A child has none of its parent's threads, and must not touch their locks.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool_of_process.store(nullptr); });
  static_cast<void>(registered);
#endif
  Pool* made = new Pool;
  pool_of_process.store(made, std::memory_order_release);
  return *made;
}

}  // namespace

void run_phases(int threads, std::vector<std::int64_t> items, PhaseWork work, const void* context, std::vector<Ahead> ahead) {
  if (threads <= 1) {
    for (std::size_t phase = 0; phase < items.size(); ++phase)
      for (std::int64_t item = 0; item < items[phase]; ++item) work(context, static_cast<int>(phase), item, 0);
    return;
  }
  pool().run(std::make_shared<Job>(threads, std::move(items), work, context, std::move(ahead)), threads);
}

}  // namespace edge
