// Work in phases, shared with the helper threads of the process (thread_pool.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace edge {

using PhaseWork = void (*)(const void* context, int phase, std::int64_t item, int thread);

void run_phases(int threads, std::vector<std::int64_t> items, PhaseWork work, const void* context);

// Calls work(phase, item, thread) for every item of every phase; a phase starts when the one before is complete. Which
// thread takes which item varies, so items must not share results. `work` must not throw.
template <typename Work>
void run_phases(int threads, std::vector<std::int64_t> items, const Work& work) {
  run_phases(
      threads, std::move(items),
      [](const void* context, int phase, std::int64_t item, int thread) {
        (*static_cast<const Work*>(context))(phase, item, thread);
      },
      &work);
}

// A helper must have enough to do to be worth the hand-over: one for every `share` of work, at most `limit`.
inline int threads_worth(int limit, std::int64_t work, std::int64_t share) {
  return static_cast<int>(std::clamp<std::int64_t>(work / share, 1, std::clamp(limit, 1, 256)));
}

}  // namespace edge
