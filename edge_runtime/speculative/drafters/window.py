"""Which part of a long sequence a drafter's KV memory holds: its first ids, and the latest.

The rows between are left out, and the ids of the window get the positions 0, 1, 2, … of a short text: keys and values
depend on position differences alone, so a small model keeps within the context it was made for (SpecMemo keeps a draft
cache of constant size likewise). A window that moved is computed anew, at most once in a quarter of its rows.
Knows: lengths. Does not know: ids, models, bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ANCHOR_SHARE = 16  # of the rows: the first ids draw much attention, whatever they are
_ROOM_SHARE = 4  # the longest draft


@dataclass(frozen=True, slots=True)
class Window:
    """Of at most `rows` (from 4) ids."""

    rows: int

    @property
    def anchor(self) -> int:
        """Ids from the sequence's start that stay."""
        return self.rows // _ANCHOR_SHARE

    @property
    def longest_draft(self) -> int:
        return self.rows // _ROOM_SHARE

    def start(self, length: int, room: int, current: int) -> int:
        """Where the latest ids begin, for `length` ids and `room` (at most `longest_draft`) to come.

        `current`: where they begin now; it stays while they fit. `anchor` where nothing is left out.
        """
        if length + room <= self.rows:
            return self.anchor
        held = self.anchor + length - current
        if self.rows // _ROOM_SHARE <= held <= self.rows - room:  # fewer: too little was left by going back
            return current
        return length - (self.rows // 2 - self.anchor)

    def ids(self, sequence: Sequence[int], start: int) -> list[int]:
        return [*sequence[: self.anchor], *sequence[start:]]
