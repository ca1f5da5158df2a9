"""What waits to go to other devices: in order for each, and none waits for another.

Knows: one queue and one task per device of the current plan. Does not know: how a device is reached, or what a message
means beyond the session it is about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.messages import FrameRows, Message, OpenSession, Tokens
from edge_runtime.transport.base import Frame

log = logging.getLogger(__name__)

SEND_SECONDS = 30.0

SendTo = Callable[[str, Message, Sequence[Frame]], Awaitable[None]]
OnLost = Callable[[OpenSession | FrameRows | Tokens, str], None]
Item = tuple[OpenSession | FrameRows | Tokens, Sequence[Frame]]


class PeerOutbox:
    """`on_lost` is told of each message that could not be sent: its session can't go on without it."""

    def __init__(self, tasks: asyncio.TaskGroup, send: SendTo, on_lost: OnLost) -> None:
        self._tasks = tasks
        self._send = send
        self._on_lost = on_lost
        self._queues: dict[str, tuple[asyncio.Queue[Item], asyncio.Task[None]]] = {}

    def post(
        self, device_id: str, message: OpenSession | FrameRows | Tokens, payloads: Sequence[Frame]
    ) -> None:
        if device_id not in self._queues:
            queue: asyncio.Queue[Item] = asyncio.Queue()
            self._queues[device_id] = queue, self._tasks.create_task(self._drain(device_id, queue))
        self._queues[device_id][0].put_nowait((message, payloads))

    def clear(self) -> None:
        """The plan is over: nothing of it is worth sending."""
        for _, task in self._queues.values():
            task.cancel()
        self._queues.clear()

    async def _drain(self, device_id: str, queue: asyncio.Queue[Item]) -> None:
        while True:
            message, payloads = await queue.get()
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._send(device_id, message, payloads)
            except TimeoutError:
                self._lost(device_id, message, f"it took nothing for {SEND_SECONDS:g} s")
            except EdgeRuntimeError as problem:
                self._lost(device_id, message, problem.message)

    def _lost(self, device_id: str, message: OpenSession | FrameRows | Tokens, reason: str) -> None:
        log.warning(
            "lease %d: session %d: device %s could not be reached: %s",
            message.lease,
            message.session,
            device_id,
            reason,
        )
        self._on_lost(message, f"device {device_id[:8]} could not be reached: {reason}")
