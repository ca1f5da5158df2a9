"""A list that is due: its bytes but for one hole, where its row goes, and who is told when it has come.

Knows: bytes of a list in one piece (`Channel.whole_head` and its frames). Does not know: sockets, peers, messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ExpectedPiece(NamedTuple):
    """`before`, a hole, `after` up to byte `row_at`, then the row. Pieces of one list differ in `row_at`."""

    row_at: int
    before: bytes
    after: bytes


class Expected(NamedTuple):
    """`place` [bytes of the row] takes the row before `look` is called with the hole's bytes; None where there is none.

    What `look` returns is called once the list has been delivered.
    """

    pieces: Sequence[ExpectedPiece]
    place: NDArray[np.uint8] | None
    look: Callable[[bytes], Callable[[], None] | None]

    def hole_in(self, piece: bytes) -> bytes | None:
        """What native code finds in a piece (`Inlet`), and the row in its place; None where it is not what is due."""
        row_bytes = 0 if self.place is None else self.place.nbytes
        for row_at, before, after in self.pieces:
            if len(piece) != row_at + row_bytes:
                continue
            said = piece[:row_at]
            if not said.startswith(before) or not said.endswith(after) or row_at < len(before) + len(after):
                return None
            if self.place is not None:
                self.place[:] = np.frombuffer(piece, np.uint8, offset=row_at)
            return said[len(before) : row_at - len(after)]
        return None
