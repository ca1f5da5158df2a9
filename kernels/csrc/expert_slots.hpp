// Which expert is in which slot of an arena, and which goes when room is needed: the least frequently and recently used.
//
// The same decisions as SlotTable with LeastFrequentlyRecentlyUsed (edge_runtime/experts), which are the reference; native,
// since a step asks once for every layer. One thread uses it.
#pragma once

#include <cstdint>
#include <vector>

namespace edge {

class ExpertSlots {
 public:
  static constexpr std::int32_t kAbsent = -1;

  // Keys are 0 .. keys - 1.
  ExpertSlots(std::int64_t slots, std::int64_t keys);

  std::int64_t slots() const { return static_cast<std::int64_t>(key_of_.size()); }
  std::int64_t keys() const { return static_cast<std::int64_t>(slot_of_.size()); }
  std::int64_t resident() const { return slots() - static_cast<std::int64_t>(free_.size()); }
  std::int32_t slot(std::int64_t key) const { return slot_of_[static_cast<std::size_t>(key)]; }
  std::int32_t key(std::int64_t slot) const { return key_of_[static_cast<std::size_t>(slot)]; }

  // A hit is pinned; its slot, or kAbsent.
  std::int32_t use(std::int64_t key, std::int64_t step, std::int64_t rows);
  // Of an absent key: its slot, pinned; kAbsent where everything is pinned or held.
  std::int32_t admit(std::int64_t key, std::int64_t step, std::int64_t rows);
  void unpin(std::int64_t key);
  void unpin_all();
  // What was admitted did not arrive.
  void forget(std::int64_t key);
  // Whoever is in it stays, beyond the batch.
  void hold(std::int64_t slot) { held_[static_cast<std::size_t>(slot)] = 1; }
  void release(std::int64_t slot) { held_[static_cast<std::size_t>(slot)] = 0; }

 private:
  void used(std::size_t slot, std::int64_t step, std::int64_t rows);
  std::int32_t evict(std::int64_t step);
  void leave(std::size_t slot);

  std::vector<std::int32_t> slot_of_, key_of_, free_;
  std::vector<std::uint8_t> pinned_, held_;
  // Of the expert in each slot: uses, the last one's step and running number; of each key: uses when it left last.
  std::vector<double> count_, step_, order_, count_of_;
  std::vector<double> scores_;
  double uses_ = 0.0;
};

}  // namespace edge
