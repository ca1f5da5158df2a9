"""Loop, floor and service times, from when drafts were sent and when ids arrived.

The row of a draft gives the sample of the id after it: an id that arrives tells how long the draft before it took.

Knows: times of one request's ids. Does not know: ids, windows, what follows from the times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.speculative.estimates import Estimates

IN_TIME = 0.5  # of a turn: ids that follow faster came from drafts, the target alone can't make them
QUEUED = 1.25  # verdicts that come so much slower than their drafts were sent waited for the target
_UNKNOWN = -1.0


@dataclass(slots=True)
class RoundTrips:
    """Times are the caller's, in seconds; negative: not known."""

    estimates: Estimates
    last_commit_seconds: float = _UNKNOWN
    _is_turn: bool = False  # the next id is the target's own: nothing was in flight
    _next_row_seconds: float = _UNKNOWN  # when the draft was sent whose row is sampled next
    _judged_row_seconds: float = _UNKNOWN  # of the last id that arrived

    def arrived(self, right_sent_seconds: Sequence[float], ids: int, now_seconds: float) -> None:
        """So many ids at once; the first of them were drafts, sent at these times."""
        before, after_miss = self.last_commit_seconds, self._is_turn
        waited = now_seconds - before
        if after_miss and before >= 0:
            self.estimates.turned(waited)
        in_time = before >= 0 and waited < IN_TIME * self.estimates.floor_seconds
        rows = [self._next_row_seconds if in_time else _UNKNOWN, *right_sent_seconds[: ids - 1]]
        for sent in rows:
            if sent >= 0:
                self.estimates.looped(now_seconds - sent)
        if in_time and not after_miss and len(rows) == ids:
            self._serve(rows[-1], waited, ids)
        self._judged_row_seconds = rows[-1] if len(rows) == ids else _UNKNOWN
        self._next_row_seconds = right_sent_seconds[-1] if len(right_sent_seconds) == ids else _UNKNOWN
        self._is_turn = before < 0
        self.last_commit_seconds = now_seconds

    def missed(self, *, rescue_follows: bool = False) -> None:
        """Among the ids that arrived last was one that a draft had wrong; the next id may be a side row's."""
        self._is_turn = not rescue_follows

    def _serve(self, sent: float, waited: float, rows: int) -> None:
        if sent >= 0 and self._judged_row_seconds >= 0:
            spacing = sent - self._judged_row_seconds
            self.estimates.served(waited, rows, queued=waited > QUEUED * spacing)
