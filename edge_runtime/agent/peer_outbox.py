"""What waits to go to other devices: in order for each, and none waits for another.

What can be sent at once is: a task would have to be woken for it first, and a hop is made of such wake-ups.

Knows: one queue and one task per device of the current plan. Does not know: how a device is reached, or what a message
means beyond the session it is about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from edge_runtime.agent.step_messages import parts
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.messages import (
    FrameRows,
    Message,
    OpenSession,
    RowsHeld,
    StepRows,
    StepTokens,
    Tokens,
)
from edge_runtime.transport.base import Frame

log = logging.getLogger(__name__)

SEND_SECONDS = 30.0

SessionMessage = OpenSession | FrameRows | Tokens | RowsHeld
PeerMessage = SessionMessage | StepRows | StepTokens

TrySend = Callable[[str, Message, Sequence[Frame]], bool]
SendTo = Callable[[str, Message, Sequence[Frame]], Awaitable[None]]
OnLost = Callable[[SessionMessage, str], None]
Item = tuple[PeerMessage, Sequence[Frame]]


@dataclass(slots=True)
class _Lane:
    """The way to one device. `waiting`: messages queued or being sent."""

    queue: asyncio.Queue[Item]
    task: asyncio.Task[None]
    waiting: int = 0


class PeerOutbox:
    """`on_lost` is told of each session's message that could not be sent: the session can't go on without it.

    `try_send` sends now, or answers False and does nothing.
    """

    def __init__(self, tasks: asyncio.TaskGroup, try_send: TrySend, send: SendTo, on_lost: OnLost) -> None:
        self._tasks = tasks
        self._try_send = try_send
        self._send = send
        self._on_lost = on_lost
        self._lanes: dict[str, _Lane] = {}

    def post(self, device_id: str, message: PeerMessage, payloads: Sequence[Frame]) -> None:
        lane = self._lanes.get(device_id)
        if (lane is None or not lane.waiting) and self._try_send(device_id, message, payloads):
            return
        if lane is None:
            queue: asyncio.Queue[Item] = asyncio.Queue()
            lane = _Lane(queue, self._tasks.create_task(self._drain(device_id, queue)))
            self._lanes[device_id] = lane
        lane.waiting += 1
        lane.queue.put_nowait((message, payloads))

    def is_clear(self, device_id: str) -> bool:
        """Whether nothing waits for the device."""
        lane = self._lanes.get(device_id)
        return lane is None or not lane.waiting

    def clear(self) -> None:
        """The plan is over: nothing of it is worth sending."""
        for lane in self._lanes.values():
            lane.task.cancel()
        self._lanes.clear()

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
            finally:
                lane = self._lanes.get(device_id)
                if lane is not None and lane.queue is queue:
                    lane.waiting -= 1

    def _lost(self, device_id: str, message: PeerMessage, reason: str) -> None:
        for each in parts(message):
            assert isinstance(each, SessionMessage)
            log.warning(
                "lease %d: session %d: device %s could not be reached: %s",
                each.lease,
                each.session,
                device_id,
                reason,
            )
            self._on_lost(each, f"device {device_id[:8]} could not be reached: {reason}")
