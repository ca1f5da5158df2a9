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


@dataclass(frozen=True, slots=True)
class Sent:
    """A draft that is in flight. Sent once, both are the same; else its loop can't be told, only a bound of it."""

    first_seconds: float
    last_seconds: float

    @property
    def is_resent(self) -> bool:
        return self.last_seconds > self.first_seconds

    def again(self, now_seconds: float) -> Sent:
        return Sent(self.first_seconds, now_seconds)


@dataclass(slots=True)
class RoundTrips:
    """Times are the caller's, in seconds; negative: never yet."""

    estimates: Estimates
    last_commit_seconds: float = _UNKNOWN
    _is_turn: bool = False  # the next id is the target's own: nothing was in flight
    _next_row: Sent | None = None  # the draft whose row is sampled next
    _judged_row: Sent | None = None  # of the last id that arrived

    def arrived(self, right: Sequence[Sent], ids: int, now_seconds: float, *, is_more: bool) -> None:
        """So many ids at once; the first of them were drafts, sent at these times. `is_more`: others are in flight."""
        before, after_miss = self.last_commit_seconds, self._is_turn
        waited = now_seconds - before
        if after_miss and before >= 0:
            self.estimates.turned(waited if right else waited / ids)
        in_time = before >= 0 and waited < IN_TIME * self.estimates.floor_seconds
        rows = [self._next_row if in_time else None, *right[: ids - 1]]
        for sent in rows:
            if sent is not None:
                self.estimates.looped(now_seconds - sent.first_seconds, is_bound=sent.is_resent)
        if in_time and not after_miss and len(rows) == ids:
            self._serve(rows[-1], waited, ids)
        self._judged_row = rows[-1] if len(rows) == ids else None
        self._next_row = right[-1] if len(right) == ids else None
        # With nothing in flight the target makes the next id by itself, whatever is sent now. To measure it only after
        # misses would leave one hasty sample in force for as long as nothing is drafted because of it.
        self._is_turn = not is_more and len(right) < ids
        self.last_commit_seconds = now_seconds

    def missed(self, *, rescue_follows: bool = False) -> None:
        """Among the ids that arrived last was one that a draft had wrong; the next id may be a side row's."""
        self._is_turn = not rescue_follows

    def _serve(self, sent: Sent | None, waited: float, rows: int) -> None:
        before = self._judged_row
        if sent is not None and before is not None and not sent.is_resent and not before.is_resent:
            spacing = sent.first_seconds - before.first_seconds
            self.estimates.served(waited, rows, queued=waited > QUEUED * spacing)
