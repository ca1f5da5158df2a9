#include "expert_slots.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "arrays.hpp"

namespace edge {

ExpertSlots::ExpertSlots(std::int64_t slots, std::int64_t keys) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 30;
  require(slots > 0 && keys > 0 && slots < kLimit && keys < kLimit, "a table needs slots and keys");
  const auto n = static_cast<std::size_t>(slots), k = static_cast<std::size_t>(keys);
  slot_of_.assign(k, kAbsent);
  key_of_.assign(n, kAbsent);
  for (std::size_t slot = n; slot-- > 0;) free_.push_back(static_cast<std::int32_t>(slot));
  pinned_.assign(n, 0);
  held_.assign(n, 0);
  count_.assign(n, 0.0);
  step_.assign(n, 0.0);
  order_.assign(n, 0.0);
  scores_.assign(n, 0.0);
  count_of_.assign(k, 0.0);
}

std::int32_t ExpertSlots::use(std::int64_t key, std::int64_t step, std::int64_t rows) {
  const std::int32_t slot = this->slot(key);
  if (slot == kAbsent) return slot;
  used(static_cast<std::size_t>(slot), step, rows);
  pinned_[static_cast<std::size_t>(slot)] = 1;
  return slot;
}

std::int32_t ExpertSlots::admit(std::int64_t key, std::int64_t step, std::int64_t rows) {
  std::int32_t slot = kAbsent;
  if (free_.empty()) {
    slot = evict(step);
  } else {
    slot = free_.back();
    free_.pop_back();
  }
  if (slot == kAbsent) return slot;
  const auto place = static_cast<std::size_t>(slot), own = static_cast<std::size_t>(key);
  slot_of_[own] = slot;
  key_of_[place] = static_cast<std::int32_t>(key);
  pinned_[place] = 1;
  count_[place] = count_of_[own];
  used(place, step, rows);
  return slot;
}

void ExpertSlots::unpin(std::int64_t key) {
  const std::int32_t slot = this->slot(key);
  if (slot != kAbsent) pinned_[static_cast<std::size_t>(slot)] = 0;
}

void ExpertSlots::unpin_all() { std::fill(pinned_.begin(), pinned_.end(), std::uint8_t{0}); }

void ExpertSlots::forget(std::int64_t key) {
  const std::int32_t slot = this->slot(key);
  if (slot == kAbsent) return;
  leave(static_cast<std::size_t>(slot));
  free_.push_back(slot);
}

void ExpertSlots::used(std::size_t slot, std::int64_t step, std::int64_t rows) {
  uses_ += 1.0;
  count_[slot] += std::sqrt(static_cast<double>(rows));
  step_[slot] = static_cast<double>(step);
  order_[slot] = uses_;
}

std::int32_t ExpertSlots::evict(std::int64_t step) {
  const double now = 1.0 + static_cast<double>(step), unit = 1e-9 / (uses_ + 1.0);
  const std::size_t slots = key_of_.size();
  for (std::size_t slot = 0; slot < slots; ++slot)
    scores_[slot] = count_[slot] / (now - step_[slot]) + order_[slot] * unit;
  for (std::size_t slot = 0; slot < slots; ++slot)
    if (pinned_[slot] | held_[slot]) scores_[slot] = std::numeric_limits<double>::infinity();
  const auto least = std::min_element(scores_.begin(), scores_.end());
  if (*least == std::numeric_limits<double>::infinity()) return kAbsent;
  const auto slot = static_cast<std::size_t>(least - scores_.begin());
  leave(slot);
  return static_cast<std::int32_t>(slot);
}

void ExpertSlots::leave(std::size_t slot) {
  const auto key = static_cast<std::size_t>(key_of_[slot]);
  count_of_[key] = count_[slot];
  slot_of_[key] = key_of_[slot] = kAbsent;
  pinned_[slot] = 0;
}

namespace {

std::int64_t checked(std::int64_t index, std::int64_t count) {
  require(index >= 0 && index < count, "no such slot or key");
  return index;
}

}  // namespace

void bind_expert_slots(nb::module_& m) {
  using S = ExpertSlots;
  nb::class_<S>(m, "ExpertSlots")
      .def(nb::init<std::int64_t, std::int64_t>())
      .def_prop_ro("slots", &S::slots)
      .def_prop_ro("resident", &S::resident)
      .def("slot", [](const S& s, std::int64_t key) { return s.slot(checked(key, s.keys())); })
      .def("key", [](const S& s, std::int64_t slot) { return s.key(checked(slot, s.slots())); })
      .def("use", [](S& s, std::int64_t key, std::int64_t step, std::int64_t rows) { return s.use(checked(key, s.keys()), step, rows); })
      .def("admit", [](S& s, std::int64_t key, std::int64_t step, std::int64_t rows) {
        require(s.slot(checked(key, s.keys())) == S::kAbsent, "an expert that is here can't be admitted");
        return s.admit(key, step, rows);
      })
      .def("unpin", [](S& s, std::int64_t key) { s.unpin(checked(key, s.keys())); })
      .def("unpin_all", &S::unpin_all)
      .def("forget", [](S& s, std::int64_t key) { s.forget(checked(key, s.keys())); })
      .def("hold", [](S& s, std::int64_t slot) { s.hold(checked(slot, s.slots())); })
      .def("release", [](S& s, std::int64_t slot) { s.release(checked(slot, s.slots())); });
}

}  // namespace edge
