"""Virtual time: calls that are due, in order.

Knows: seconds and calls. Does not know: what is simulated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """What is due at the same time happens in the order in which it was asked for."""
        heapq.heappush(self._due, (self.now_seconds + seconds, next(self._order), call))

    def run(self, is_over: Callable[[], bool], longest_seconds: float) -> None:
        """Raises TimeoutError where nothing is left to happen, or the time is up, before it is over."""
        while not is_over():
            if not self._due or self._due[0][0] > longest_seconds:
                raise TimeoutError(f"the simulation stands still at {self.now_seconds:.1f} s")
            self.now_seconds, _, call = heapq.heappop(self._due)
            call()
