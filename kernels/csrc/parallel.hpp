// Work in phases, shared with the helper threads of the process (thread_pool.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace edge {

using PhaseWork = void (*)(const void* context, int phase, std::int64_t item, int thread);

// Memory that a thread reads at the beginning of its stretch.
struct Ahead {
  const std::uint8_t* data = nullptr;
  std::int64_t size_bytes = 0;
};

void run_phases(int threads, std::vector<std::int64_t> items, PhaseWork work, const void* context, std::vector<Ahead> ahead);

// Where a thread begins among the items of a phase: each has a stretch of its own, and helps the others when it is done.
inline std::int64_t first_item(std::int64_t items, int threads, int thread) { return items * thread / threads; }

// Calls work(phase, item, thread) for every item of every phase; a phase starts when the one before is complete. Which
// thread takes which item varies, so items must not share results. `work` must not throw. While a thread waits at the end
// of phase p, it fetches ahead[p * threads + thread], if there are any, into its cache.
template <typename Work>
void run_phases(int threads, std::vector<std::int64_t> items, const Work& work, std::vector<Ahead> ahead = {}) {
  run_phases(
      threads, std::move(items),
      [](const void* context, int phase, std::int64_t item, int thread) {
        (*static_cast<const Work*>(context))(phase, item, thread);
      },
      &work, std::move(ahead));
}

// A helper must have enough to do to be worth the hand-over: one for every `share` of work, at most `limit`.
inline int threads_worth(int limit, std::int64_t work, std::int64_t share) {
  return static_cast<int>(std::clamp<std::int64_t>(work / share, 1, std::clamp(limit, 1, 256)));
}

}  // namespace edge
