"""How long to wait before dialling again: twice as long each time, with jitter, so that many agents don't come at once.

Knows: numbers. Does not know: clocks or links.
"""

from __future__ import annotations

from random import Random

FIRST_SECONDS = 0.2
MOST_SECONDS = 10.0


class Backoff:
    def __init__(self, rng: Random, *, first: float = FIRST_SECONDS, most: float = MOST_SECONDS) -> None:
        self._rng = rng
        self._first = first
        self._most = most
        self._tries = 0

    def next_seconds(self) -> float:
        """Between half of the step and all of it."""
        step = min(self._most, self._first * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return step * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._tries = 0
