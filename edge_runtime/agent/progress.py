"""How often progress is told: at once when it changes its kind or is complete, else a few times a second.

Knows: a clock it is given. Does not know: who is told.
"""

from __future__ import annotations

from collections.abc import Callable

EVERY_SECONDS = 0.25


class ProgressGate:
    def __init__(self, clock: Callable[[], float], every_seconds: float = EVERY_SECONDS) -> None:
        self._clock = clock
        self._every_seconds = every_seconds
        self._activity = ""
        self._told_at = 0.0

    def opens(self, activity: str, is_complete: bool) -> bool:
        now = self._clock()
        if activity == self._activity and not is_complete and now - self._told_at < self._every_seconds:
            return False
        self._activity, self._told_at = activity, now
        return True
