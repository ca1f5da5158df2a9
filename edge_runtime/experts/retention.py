"""Experts that are guessed to be wanted soon stay in memory until their layer has come.

The policy ranks the others as ever; what is kept is merely not among those that may go.

Knows: slots. Does not know: who guessed, or how.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_runtime.experts.slot_table import ABSENT, Slots

FREE_SHARE = 2  # at least one slot in so many is left to the layer that runs now


class Retention:
    """One thread uses it."""

    def __init__(self) -> None:
        self._held: list[tuple[Slots, int]] = []

    def keep(self, table: Slots, keys: Iterable[int], uses: int) -> None:
        """Those of `keys` that are in memory, until `let_go`. `uses`: slots that the layer that runs now may need."""
        room = table.slots // FREE_SHARE - uses
        for key in keys:
            slot = table.slot(key)
            if slot == ABSENT:
                continue
            if room <= 0:
                return
            room -= 1
            table.hold(slot)
            self._held.append((table, slot))

    def let_go(self) -> None:
        for table, slot in self._held:
            table.release(slot)
        self._held.clear()
