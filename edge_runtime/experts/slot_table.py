"""Which expert is in which slot of the arena. Decides; reads nothing.

The live cache and the replay of recorded traces share it, so that a replay predicts what the cache would have done.

Knows: slots, keys, pins. Does not know: bytes, files, threads (one thread uses it).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from edge_kernels.flash_layer import ExpertSlots

from edge_runtime.experts.policies import POLICIES, Policy

ABSENT = -1
NATIVE_POLICY = "lfru"


class Slots(Protocol):
    """What `SlotTable` does, here or in a kernel."""

    @property
    def slots(self) -> int: ...
    @property
    def resident(self) -> int: ...
    def slot(self, key: int) -> int: ...
    def key(self, slot: int) -> int: ...
    def hold(self, slot: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def use(self, key: int, step: int, rows: int) -> int: ...
    def admit(self, key: int, step: int, rows: int) -> int: ...
    def unpin(self, key: int) -> None: ...
    def unpin_all(self) -> None: ...
    def forget(self, key: int) -> None: ...


def make_slots(slots: int, keys: int, policy: str) -> Slots:
    """The kernel's table where it knows the policy; it decides as `SlotTable` does."""
    if policy == NATIVE_POLICY:
        return ExpertSlots(slots, keys)
    return SlotTable(slots, keys, POLICIES[policy](slots, keys))


class SlotTable:
    """Keys are 0 .. keys - 1. A pinned key stays: it is being read, or a kernel reads it."""

    def __init__(self, slots: int, keys: int, policy: Policy) -> None:
        self._slots = slots
        self._policy = policy
        self._slot_of = [ABSENT] * keys
        self._key_of = [ABSENT] * slots
        self._free = list(reversed(range(slots)))
        self._pinned = np.zeros(slots, bool)
        self._held = np.zeros(slots, bool)
        self._resident = 0

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def resident(self) -> int:
        return self._resident

    def slot(self, key: int) -> int:
        """ABSENT where the expert is not here."""
        return self._slot_of[key]

    def key(self, slot: int) -> int:
        """ABSENT where the slot is free."""
        return self._key_of[slot]

    def hold(self, slot: int) -> None:
        """Whoever is in it stays, beyond the batch: more of it is being read."""
        self._held[slot] = True

    def release(self, slot: int) -> None:
        self._held[slot] = False

    def use(self, key: int, step: int, rows: int) -> int:
        """A hit or a miss, for the policy; a hit is pinned. Returns the slot, or ABSENT."""
        slot = self._slot_of[key]
        if slot != ABSENT:
            self._policy.used(slot, key, step, rows)
            self._pinned[slot] = True
        return slot

    def admit(self, key: int, step: int, rows: int) -> int:
        """Make room for an absent expert and pin it. ABSENT where everything is pinned."""
        slot = self._free.pop() if self._free else self._evict(step)
        if slot == ABSENT:
            return ABSENT
        self._slot_of[key], self._key_of[slot] = slot, key
        self._pinned[slot] = True
        self._resident += 1
        self._policy.admitted(slot, key, step)
        self._policy.used(slot, key, step, rows)
        return slot

    def unpin(self, key: int) -> None:
        slot = self._slot_of[key]
        if slot != ABSENT:
            self._pinned[slot] = False

    def unpin_all(self) -> None:
        self._pinned[:] = False

    def forget(self, key: int) -> None:
        """What was admitted did not arrive."""
        slot = self._slot_of[key]
        if slot != ABSENT:
            self._leave(slot)
            self._free.append(slot)

    def _evict(self, step: int) -> int:
        scores = self._policy.scores(step)
        taken = self._pinned | self._held
        scores[taken] = np.inf
        slot = int(scores.argmin())
        if taken[slot]:
            return ABSENT
        self._leave(slot)
        return slot

    def _leave(self, slot: int) -> None:
        key = self._key_of[slot]
        self._policy.evicted(slot, key)
        self._slot_of[key], self._key_of[slot] = ABSENT, ABSENT
        self._pinned[slot] = False
        self._resident -= 1
