"""Drafters of one kind for one request after another: made when needed, one kept for the next.

Knows: threads with drafters, which are idle. Does not know: which drafter, requests.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.driver import DrafterThread

MAX_IDLE = 1  # kept for the next request: a model's weights need not be read twice


class DrafterPool:
    """`make` runs on the drafter's own thread. One event loop uses a pool."""

    def __init__(self, make: Callable[[], Drafter]) -> None:
        self._make = make
        self._idle: list[DrafterThread] = []
        self._threads: set[DrafterThread] = set()

    async def take(self) -> DrafterThread:
        """For one request. Raises what `make` raises."""
        if self._idle:
            return self._idle.pop()
        thread = DrafterThread(self._make)
        await thread.open()
        self._threads.add(thread)
        return thread

    async def give(self, thread: DrafterThread, *, is_sound: bool) -> None:
        """Back from a request. A drafter that failed is not used again."""
        if is_sound and len(self._idle) < MAX_IDLE:
            self._idle.append(thread)
        else:
            self._threads.discard(thread)
            await thread.close()

    async def close(self) -> None:
        self._idle.clear()
        while self._threads:
            await self._threads.pop().close()
