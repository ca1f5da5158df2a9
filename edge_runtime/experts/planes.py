"""How many planes of the expert in each slot are in memory, and whose next one is worth reading first.

An expert's planes come in order: each makes a usable expert of those before it (`edge_kernels.nested`). The plane whose
expert was used most is read first (D2MoE, arXiv 2504.15299, "hottest-expert-bit-first"), a use counted for what the
plane is worth: 4 bits have a sixteenth of the squared error of 2, so a third plane removes a sixteenth of what a second
one does, and has twice the bytes.

Knows: slots, planes, uses. Does not know: bytes, files, threads (one thread uses it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NEXT_PLANE_WORTH = 1 / 32  # a byte of it, of the plane's before it


class PlaneTable:
    """Of `slots` slots whose experts have `planes` planes."""

    def __init__(self, slots: int, planes: int) -> None:
        self.planes = planes
        self._here = np.zeros(slots, np.intp)
        self._uses = np.zeros(slots)
        self._is_coming = np.zeros(slots, bool)
        self._may_grow = np.zeros(slots, bool)

    def here(self, slot: int) -> int:
        """Planes that are in memory and right; 0 while the first is on its way."""
        return int(self._here[slot])

    def admitted(self, slot: int) -> None:
        """Another expert gets this slot."""
        self._here[slot] = 0
        self._uses[slot] = 0.0
        self._may_grow[slot] = False

    def arrived(self, slot: int, planes: int) -> None:
        """So many are here now."""
        self._here[slot] = planes
        self._is_coming[slot] = False
        self._may_grow[slot] = planes < self.planes

    def came(self, slots: Sequence[int], planes: int) -> None:
        """Other experts are in these slots, with so many planes, which nobody has used."""
        for slot in slots:
            self.admitted(slot)
            self.arrived(slot, planes)

    def used(self, slot: int, rows: int) -> None:
        self._uses[slot] += rows

    def used_each(self, slots: Sequence[int], rows: NDArray[np.intp]) -> None:
        """Slots of different experts, each by so many rows; -1: by nobody, it is not here."""
        places = np.array(slots, np.intp)
        here = places >= 0
        self._uses[places[here]] += rows[here]

    def next_upgrades(self, most: int) -> list[int]:
        """Slots whose next plane is to be read, the one worth most first, at most so many; it counts as on its way."""
        candidates = np.flatnonzero(self._may_grow & ~self._is_coming)
        worth = self._uses[candidates] * NEXT_PLANE_WORTH ** self._here[candidates]
        order = np.argsort(-worth, kind="stable")
        chosen = candidates[order[:most]]
        self._is_coming[chosen] = True
        return [int(slot) for slot in chosen]

    def gave_up(self, slot: int) -> None:
        """Its next plane can't be had: the expert stays as it is for as long as it stays."""
        self._is_coming[slot] = False
        self._may_grow[slot] = False
