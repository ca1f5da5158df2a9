"""Which resident expert goes when room is needed.

A policy keeps a few numbers per slot and turns them into scores: the lowest goes first. Scores are computed only when
something has to go, over all slots at once. Pure: no clock, no randomness; `step` counts tokens (batches).

Knows: how often and how lately each slot was used. Does not know: what is in it, pinning, reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

_PROTECTED_SHARE = 0.8
_NEVER = float(1 << 62)


class Policy(Protocol):
    """Slots are 0 .. n - 1; keys name experts for as long as the cache lives, in memory or not."""

    def used(self, slot: int, key: int, step: int, rows: int) -> None:
        """The expert in `slot` serves `rows` rows of step `step`. Called right after `admitted`, too."""
        ...

    def admitted(self, slot: int, key: int, step: int) -> None: ...

    def evicted(self, slot: int, key: int) -> None: ...

    def scores(self, step: int) -> Scores:
        """Of all slots; the lowest goes first. The caller may change the array."""
        ...


MakePolicy = Callable[[int, int], Policy]  # (slots, keys)


class _Uses:
    """What most policies need: uses of the expert in each slot, the last one's step, and a running number of it."""

    def __init__(self, slots: int, keys: int) -> None:
        self.count = np.zeros(slots)
        self.step = np.zeros(slots)
        self.order = np.zeros(slots)
        self._uses = 0

    def admitted(self, slot: int, key: int, step: int) -> None:
        self.count[slot] = 0.0

    def used(self, slot: int, key: int, step: int, rows: int) -> None:
        self._uses += 1
        self.count[slot] += math.sqrt(
            rows
        )  # a prompt's rows say something about what comes, but not each as much
        self.step[slot] = step
        self.order[slot] = self._uses

    def evicted(self, slot: int, key: int) -> None:
        pass


class LeastRecentlyUsed(_Uses):
    def scores(self, step: int) -> Scores:
        return self.order.copy()


class LeastFrequentlyUsed(_Uses):
    """Counts survive eviction: an expert that comes back is known. Ties go to the one used longest ago."""

    def __init__(self, slots: int, keys: int) -> None:
        super().__init__(slots, keys)
        self._count_of = np.zeros(keys)

    def admitted(self, slot: int, key: int, step: int) -> None:
        self.count[slot] = self._count_of[key]

    def evicted(self, slot: int, key: int) -> None:
        self._count_of[key] = self.count[slot]

    def scores(self, step: int) -> Scores:
        return self.count + self.order / (self._uses + 1.0)


class LeastFrequentlyRecentlyUsed(LeastFrequentlyUsed):
    """Uses per step of age: what was popular but is not asked for any more goes, too."""

    def scores(self, step: int) -> Scores:
        return self.count / (1.0 + step - self.step) + self.order * (1e-9 / (self._uses + 1.0))


class SegmentedLeastRecentlyUsed(_Uses):
    """A second use protects; at most a share of the slots is protected, and the oldest of them loses it."""

    def __init__(self, slots: int, keys: int) -> None:
        super().__init__(slots, keys)
        self._protected = np.zeros(slots, bool)
        self._most = int(_PROTECTED_SHARE * slots)

    def admitted(self, slot: int, key: int, step: int) -> None:
        super().admitted(slot, key, step)
        self._protected[slot] = False

    def used(self, slot: int, key: int, step: int, rows: int) -> None:
        fresh = not self.count[slot]
        super().used(slot, key, step, rows)
        if fresh or self._protected[slot]:
            return
        self._protected[slot] = True
        if np.count_nonzero(self._protected) > self._most:
            oldest = int(np.argmin(np.where(self._protected, self.order, _NEVER)))
            self._protected[oldest] = False

    def scores(self, step: int) -> Scores:
        return self.order + np.where(self._protected, self._uses + 1.0, 0.0)


class Belady:
    """The best that any policy can do that must admit what it reads: goes who is asked for last. For replays only."""

    def __init__(self, slots: int, uses: Sequence[int]) -> None:
        """`uses`: the keys of every use to come, in order."""
        times: dict[int, list[int]] = {}
        for time, key in enumerate(uses):
            times.setdefault(key, []).append(time)
        self._times = {key: list(reversed(all_times)) for key, all_times in times.items()}
        self._next = np.zeros(slots)

    def admitted(self, slot: int, key: int, step: int) -> None:
        pass

    def used(self, slot: int, key: int, step: int, rows: int) -> None:
        times = self._times[key]
        times.pop()
        self._next[slot] = times[-1] if times else _NEVER

    def evicted(self, slot: int, key: int) -> None:
        pass

    def scores(self, step: int) -> Scores:
        return -self._next


POLICIES: Mapping[str, MakePolicy] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "lfru": LeastFrequentlyRecentlyUsed,
    "slru": SegmentedLeastRecentlyUsed,
}
DEFAULT_POLICY = "lfru"
