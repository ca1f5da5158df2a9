"""When the rows of those who decode are expected back, so that prompt rows can run meanwhile.

A row that comes while a step runs is seen when that step ends: then it was away for no longer than that, nobody knows
how much less. Such a row moves the expectation down a little; a row whose coming was seen says what it is.

Knows: when rows went, came, and when steps without them ran. Does not know: clocks (times are given), how long steps
take, queues.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_runtime.core import SessionId

WEIGHT = 0.2  # of the latest time that was seen
UNSEEN_SHARE = 0.95  # what remains of the expectation after a row that came unseen
SEEN_SECONDS = 0.001  # what has arrived during a step is seen within so much of its end
PATIENCE_SECONDS = 5.0  # away for longer: stuck, and nothing is learnt from it


class AwayTime:
    def __init__(self) -> None:
        self._went: dict[SessionId, float] = {}  # of sessions whose row is away
        self._usual_seconds: float | None = None
        self._fill_ended = float("-inf")  # the last step without rows that decode

    def went(self, sessions: Iterable[SessionId], now: float) -> None:
        self._went.update((session, now) for session in sessions)

    def filled(self, now: float) -> None:
        """A step without any decode row has ended."""
        self._fill_ended = now

    def came(self, session: SessionId, now: float) -> None:
        went = self._went.pop(session, None)
        if went is None or now - went >= PATIENCE_SECONDS:
            return
        seconds = max(0.0, now - went)
        if self._usual_seconds is None:
            self._usual_seconds = seconds
        elif went < self._fill_ended and now < self._fill_ended + SEEN_SECONDS:
            self._usual_seconds = UNSEEN_SHARE * min(self._usual_seconds, seconds)
        else:
            self._usual_seconds += WEIGHT * (seconds - self._usual_seconds)

    def left(self, session: SessionId) -> None:
        self._went.pop(session, None)

    def next_at(self, now: float) -> float | None:
        """When the first of those that are away is expected. None: nobody is, or nothing is known."""
        went = [at for at in self._went.values() if now - at < PATIENCE_SECONDS]
        if not went or self._usual_seconds is None:
            return None
        return min(went) + self._usual_seconds
