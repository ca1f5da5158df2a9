// Work in phases over a few short-lived threads: nothing sleeps between calls, so fork and exit are safe.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace edge {

// Calls work(phase, item, thread) for every item of every phase; a phase starts when the one before is complete. Which
// thread takes which item varies, so items must not share results. `work` must not throw.
template <typename Work>
void run_phases(int threads, const std::vector<std::int64_t>& items, const Work& work) {
  if (threads <= 1) {
    for (std::size_t phase = 0; phase < items.size(); ++phase)
      for (std::int64_t item = 0; item < items[phase]; ++item) work(static_cast<int>(phase), item, 0);
    return;
  }
  struct Progress {
    std::atomic<std::int64_t> next{0}, done{0};
  };
  std::vector<Progress> progress(items.size());
  const auto take_part = [&](int thread) {
    for (std::size_t phase = 0; phase < items.size(); ++phase) {
      Progress& p = progress[phase];
      for (std::int64_t item; (item = p.next.fetch_add(1)) < items[phase]; p.done.fetch_add(1))
        work(static_cast<int>(phase), item, thread);
      while (p.done.load() < items[phase]) std::this_thread::yield();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads));
  try {
    for (int thread = 1; thread < threads; ++thread) helpers.emplace_back(take_part, thread);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  take_part(0);
  for (std::thread& helper : helpers) helper.join();
}

// Starting a thread costs tens of microseconds: one for every `share` of work, at most `limit`.
inline int threads_worth(int limit, std::int64_t work, std::int64_t share) {
  return static_cast<int>(std::clamp<std::int64_t>(work / share, 1, std::clamp(limit, 1, 256)));
}

}  // namespace edge
