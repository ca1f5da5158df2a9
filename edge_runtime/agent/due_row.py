"""A row that is due, and what can be ready before it comes: where its numbers go, its batch, how its answer begins.

What is made while the stage is idle need not be made between the row and its step, nor between the step and its answer.

Knows: one row that was foreseen, the sizes of frames. Does not know: engines, the rules, sockets, wire formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.agent.pipeline_events import Rows
from edge_runtime.agent.predicted_row import MAX_ID_BYTES, PredictedRow, packed_id
from edge_runtime.engine.base import Batch, Span
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.expected import ExpectedPiece

FLOAT_BYTES = 4


class DueRow:
    """`channel` is for the answer. `width`: numbers of a row whose frame is its memory; 0 where not, or unknown."""

    def __init__(self, row: PredictedRow, channel: Channel, width: int) -> None:
        self.row = row
        self._channel = channel
        self._row_bytes = width * FLOAT_BYTES
        self._place = np.empty((1, width), np.float32) if width and row.has_hidden else None
        self._place_bytes = self._place.data.cast("B") if self._place is not None else None
        is_known = isinstance(row.arriving, bytes)
        self._batch = self._batch_of(row.known_id, self._place) if is_known else None
        self._head_bytes = 0  # of any answer
        self._starts = self._starts_by_id()

    def batch(
        self, token_id: int, frames: Sequence[memoryview], rows_of: Callable[[memoryview], Rows | None]
    ) -> Batch | None:
        """Of the row that came. None: its frame is not of one row."""
        if not self.row.has_hidden:
            return self._batch_of(token_id, None)
        if self._place_bytes is None or frames[1].nbytes != self._row_bytes:
            hidden = rows_of(frames[1])
            return None if hidden is None else self._batch_of(token_id, hidden)
        self._place_bytes[:] = frames[1]
        return self._batch_of(token_id, self._place) if self._batch is None else self._batch

    @property
    def place(self) -> NDArray[np.uint8] | None:
        """Where the row's bytes go. None: nowhere, or their number is not known."""
        return None if self._place is None else self._place.reshape(-1).view(np.uint8)

    def pieces(self, head: Callable[[Sequence[int]], bytes | None]) -> list[ExpectedPiece]:
        """The list that is due, for each size that its id may have; none where its row has no place."""
        if self.row.has_hidden and self._place is None:
            return []
        arriving = self.row.arriving
        is_known = isinstance(arriving, bytes)
        before, after = (arriving, b"") if isinstance(arriving, bytes) else (arriving.before, arriving.after)
        found = []
        for id_bytes in (0,) if is_known else range(1, MAX_ID_BYTES + 1):
            message_bytes = len(before) + id_bytes + len(after)
            first = head((message_bytes, self._row_bytes) if self.row.has_hidden else (message_bytes,))
            if first is not None:
                found.append(ExpectedPiece(len(first) + message_bytes, first + before, after))
        return found

    def batch_in_place(self, token_id: int) -> Batch:
        """Of the row whose bytes are in their place already."""
        return self._batch_of(token_id, self._place) if self._batch is None else self._batch

    def send(self, token_id: int, rows: Rows | None, frame_of: Callable[[Rows], memoryview]) -> bool:
        """The answer with this id; rows [1, E]. False: its link has no room. Raises what `Channel.try_send` raises."""
        packed = packed_id(token_id)
        start = self._starts.get(len(packed))
        after = self.row.leaving.after
        if start is not None and rows is None:
            piece = start + packed + after
            return self._channel.send_whole(piece, len(piece) - self._head_bytes)
        if (
            start is not None
            and rows is not None
            and rows.nbytes == self._row_bytes
            and rows.flags.c_contiguous
        ):
            piece = b"".join((start, packed, after, rows.data))
            return self._channel.send_whole(piece, len(piece) - self._head_bytes)
        message = self.row.leaving.filled(token_id)
        return self._channel.try_send([message] if rows is None else [message, frame_of(rows)])

    def _batch_of(self, token_id: int, hidden: Rows | None) -> Batch:
        row = self.row
        return Batch((Span(row.session, row.base_row, (token_id,), int(row.samples)),), hidden)

    def _starts_by_id(self) -> dict[int, bytes]:
        """What comes before the answer's id, by the bytes of that."""
        before = self.row.leaving.before
        around = len(before) + len(self.row.leaving.after)
        if self.row.samples:
            rest: tuple[int, ...] = ()
        elif self._row_bytes:
            rest = (self._row_bytes,)
        else:
            return {}
        sizes = range(1, MAX_ID_BYTES + 1)
        heads = {size: self._channel.whole_head((around + size, *rest)) for size in sizes}
        starts = {size: head + before for size, head in heads.items() if head is not None}
        self._head_bytes = next((len(start) - len(before) for start in starts.values()), 0)
        return starts
