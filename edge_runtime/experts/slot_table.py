"""Which expert is in which slot of the arena. Decides; reads nothing.

The live cache and the replay of recorded traces share it, so that a replay predicts what the cache would have done.

Knows: slots, keys, pins. Does not know: bytes, files, threads (one thread uses it).
"""

from __future__ import annotations

import numpy as np

from edge_runtime.experts.policies import Policy

ABSENT = -1


class SlotTable:
    """Keys are 0 .. keys - 1. A pinned key stays: it is being read, or a kernel reads it."""

    def __init__(self, slots: int, keys: int, policy: Policy) -> None:
        self.slots = slots
        self._policy = policy
        self._slot_of = [ABSENT] * keys
        self._key_of = [ABSENT] * slots
        self._free = list(reversed(range(slots)))
        self._pinned = np.zeros(slots, bool)
        self._held = np.zeros(slots, bool)
        self.resident = 0

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
        self.resident += 1
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
        self.resident -= 1
