"""One sequence through an encoder: all its rows in, one vector out.

Knows: one sequence and its vector. Does not know: devices, plans, other sequences. Nothing is journalled: whoever asked
is still waiting, and asks again if the coordinator dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.sessions.live_session import LiveSession, crashed
from coordinator.sessions.port import PooledVector, Rebind, SessionPort
from edge_runtime.core import SamplingParams
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.messages import Feed, OpenSession

PATIENCE_SECONDS_PER_ROW = 0.05


class Embedding(LiveSession):
    def __init__(
        self, key: str, ids: Sequence[int], port: SessionPort, *, hidden_size: int, stall_seconds: float
    ) -> None:
        super().__init__(key, port, stall_seconds=stall_seconds)
        self.rows = len(ids)
        self.vector: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._ids = tuple(ids)
        self._hidden_size = hidden_size

    def _opening(self, number: int, lease: int) -> tuple[OpenSession, Feed]:
        rows = len(self._ids)
        opening = OpenSession(number, lease, rows, rows, rows, (), SamplingParams(), "pooler")
        return opening, Feed(number, lease, 0, self._ids)

    def _patience_seconds(self) -> float:
        return self._stall_seconds + len(self._ids) * PATIENCE_SECONDS_PER_ROW

    async def _on_pooled(self, message: PooledVector) -> None:
        if message.vector.shape != (self._hidden_size,) or not np.isfinite(message.vector).all():
            self._break("the tail sent something that is not a vector of this model")
            return
        self._close()
        self.ended = True
        if not self.vector.done():
            self.vector.set_result(message.vector)

    async def _on_rebind(self, message: Rebind) -> None:
        """Any class will do: nothing of it is journalled."""

    async def _on_failed(self, error: EdgeRuntimeError) -> None:
        if not self.vector.done():
            self.vector.set_exception(error)

    async def _on_cancelled(self) -> bool:
        self._close()
        return True

    def _on_crashed(self) -> None:
        if not self.vector.done():
            self.vector.set_exception(crashed())

    def _on_ended(self) -> None:
        self.vector.cancel()  # changes nothing where there is a result
