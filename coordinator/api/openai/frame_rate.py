"""How many frames of one socket are looked at: a flood must not take the loop from others.

Knows: a token bucket. Does not know: frames. The clock is an argument.
"""

from __future__ import annotations

from coordinator.api.errors import ApiError

FRAMES_PER_SECOND = 500.0
MOST_AT_ONCE = 500.0
MOST_REFUSED = 2000  # in a row; then the socket is closed


class FrameRate:
    def __init__(self, now: float) -> None:
        self._now = now
        self._left = MOST_AT_ONCE
        self._refused = 0

    def allows(self, now: float) -> bool:
        """Whether to look at one more. Raises ApiError where it never ends."""
        self._left = min(MOST_AT_ONCE, self._left + (now - self._now) * FRAMES_PER_SECOND)
        self._now = now
        if self._left >= 1.0:
            self._left -= 1.0
            self._refused = 0
            return True
        self._refused += 1
        if self._refused > MOST_REFUSED:
            raise ApiError(f"More than {FRAMES_PER_SECOND:g} drafts a second, on and on.", code="overloaded")
        return False
