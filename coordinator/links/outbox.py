"""What waits to be sent on one connection: in order, bounded in bytes.

Knows: sizes and order. Does not know: messages, devices.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from edge_runtime.errors import TransportError
from edge_runtime.transport.base import Connection, Frame

MAX_QUEUED_BYTES = 256 << 20
SEND_SECONDS = 60.0  # one list of frames; longer, and the device is as good as gone


class Outbox:
    """`put` never waits: one slow device must not hold up the decisions about all."""

    def __init__(self) -> None:
        self._queue: deque[tuple[list[Frame], int]] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()

    def put(self, frames: Sequence[Frame]) -> bool:
        """False: the device takes messages so slowly that its queue is full; it should be dropped."""
        size_bytes = sum(memoryview(frame).nbytes for frame in frames)
        if self._queued_bytes + size_bytes > MAX_QUEUED_BYTES:
            return False
        self._queue.append((list(frames), size_bytes))
        self._queued_bytes += size_bytes
        self._wake.set()
        return True

    async def drain(self, connection: Connection) -> None:
        """Send for ever. Raises ConnectionClosed, TransportError."""
        while True:
            while self._queue:
                frames, size_bytes = self._queue.popleft()
                try:
                    async with asyncio.timeout(SEND_SECONDS):
                        await connection.send(frames)
                except TimeoutError:
                    raise TransportError(f"it took nothing for {SEND_SECONDS:g} s") from None
                self._queued_bytes -= size_bytes
            self._wake.clear()
            await self._wake.wait()
