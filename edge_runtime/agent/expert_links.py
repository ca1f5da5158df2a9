"""Experts over the links of the compute thread: what this device asks of others in the middle of a step, and answers.

A step can't wait for the event loop, which it keeps from turning: it waits on the link's own socket, for an answer that
comes back over the link that it asked on. So there is one device that asks and others that only answer; two that asked
each other could wait for ever.

Knows: requests, answers, how long to wait. Does not know: kernels, who holds what (`edge_runtime.experts`), plans.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EdgeRuntimeError, EngineError, ProtocolError, TransportError
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.protocol.expert_messages import ExpertOutputs, ExpertRows, ExpertsRefused
from edge_runtime.transport.base import Frame
from edge_runtime.transport.mesh import Mesh

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Answer = memoryview | ExpertsRefused

ANSWER_SECONDS = 4.0  # of silence, before a peer is given up; a chunk of a prompt takes far less
REDIAL_SECONDS = 0.5
REDIALS = 20

ExpertMessage = ExpertRows | ExpertOutputs | ExpertsRefused


class ExpertLinks:
    """On the compute thread. Implements `PeerPort`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mesh: Mesh | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._redials: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, str] = {}  # request -> whom
        self._answers: dict[int, Answer] = {}
        self._lease = 0
        self._server: PeerServer | None = None
        self._may_ask: Collection[str] = ()
        self.answered = 0

    def opened(self, mesh: Mesh, tasks: asyncio.TaskGroup) -> None:
        self._mesh, self._tasks = mesh, tasks

    def begin(self, lease: int, server: PeerServer | None = None, may_ask: Collection[str] = ()) -> None:
        """Ask under this lease, or answer those who may ask."""
        self.end()
        self._lease, self._server, self._may_ask = lease, server, may_ask

    def end(self) -> None:
        """The plan is over."""
        if self._server is not None:
            self._server.close()
        for task in self._redials.values():
            task.cancel()
        self._lease, self._server, self._may_ask = 0, None, ()
        self._redials.clear()
        self._asked.clear()
        self._answers.clear()

    async def reach(self, devices: Sequence[str]) -> None:
        """Before the first step: dialling needs the loop. Raises TrustError, TransportError."""
        for device_id in devices:
            await self._need_mesh().reach(device_id)

    # ------------------------------------------------------------ asking, in a step

    def ask(
        self, device_id: str, layer: int, rows: Float32, uses: Int32, gates: Float32 | None = None
    ) -> int:
        request = next(self._numbers)
        message = ExpertRows(self._lease, request, layer)
        payloads = [np.ascontiguousarray(rows).data, np.ascontiguousarray(uses).data]
        if gates is not None:
            payloads.append(np.ascontiguousarray(gates, np.float32).data)
        if not self._need_mesh().try_send(device_id, message, payloads):
            raise self._lost(device_id, "there is no link to it")
        self._asked[request] = device_id
        return request

    def wait(self, device_id: str, ticket: int, outputs: int, hidden: int) -> Float32:
        answer = self._await_answer(device_id, ticket)
        if isinstance(answer, ExpertsRefused):
            raise EngineError(f"device {device_id[:8]} could not run its experts: {answer.reason}")
        if answer.nbytes != 4 * outputs * hidden:
            raise self._lost(device_id, "its answer does not have the size that was asked for")
        return np.frombuffer(answer, np.float32).reshape(outputs, hidden)

    def wait_until_late(
        self, device_id: str, ticket: int, outputs: int, hidden: int, seconds: float
    ) -> Float32 | None:
        """`wait`, for so long. None: it is late; the link stays, and what still comes of this request is dropped."""
        mesh, deadline = self._need_mesh(), self._clock() + seconds
        while ticket not in self._answers:
            left_seconds = deadline - self._clock()
            if left_seconds <= 0:
                self._asked.pop(ticket, None)
                return None
            try:
                mesh.wait(device_id, left_seconds)
            except EdgeRuntimeError as problem:
                raise self._lost(device_id, problem.message) from None
        return self.wait(device_id, ticket, outputs, hidden)

    def forget(self, device_id: str) -> None:
        for request in [request for request, whom in self._asked.items() if whom == device_id]:
            del self._asked[request]
            self._answers.pop(request, None)

    def _await_answer(self, device_id: str, ticket: int) -> Answer:
        mesh, deadline = self._need_mesh(), self._clock() + ANSWER_SECONDS
        while ticket not in self._answers:
            left_seconds = deadline - self._clock()
            if left_seconds <= 0:
                raise self._lost(device_id, f"it did not answer for {ANSWER_SECONDS:g} s")
            try:
                mesh.wait(device_id, left_seconds)
            except EdgeRuntimeError as problem:
                raise self._lost(device_id, problem.message) from None
        self._asked.pop(ticket, None)
        return self._answers.pop(ticket)

    def _lost(self, device_id: str, reason: str) -> TransportError:
        """Steps that come now fail at once, until the link is made anew."""
        mesh = self._need_mesh()
        self.forget(device_id)
        mesh.cut(device_id, reason)
        if self._tasks is not None and device_id not in self._redials:
            self._redials[device_id] = self._tasks.create_task(self._redial(device_id))
        return TransportError(
            f"the experts that device {device_id[:8]} holds can't be had: {reason}",
            hint="is it still running? `edge-runtime devices` shows it",
        )

    async def _redial(self, device_id: str) -> None:
        try:
            for _ in range(REDIALS):
                try:
                    await self._need_mesh().reach(device_id)
                    return
                except EdgeRuntimeError as problem:
                    log.info("device %s: %s", device_id[:8], problem.message)
                await asyncio.sleep(REDIAL_SECONDS)
        finally:
            if self._redials.get(device_id) is asyncio.current_task():
                del self._redials[device_id]

    def _need_mesh(self) -> Mesh:
        if self._mesh is None:
            raise EngineError("experts can't be asked for before the links are open")
        return self._mesh

    # ------------------------------------------------------------ what arrives

    def arrived(self, source: str, message: ExpertMessage, payloads: Sequence[memoryview]) -> None:
        """Answers nobody waits for, and requests of another plan, are dropped."""
        if isinstance(message, ExpertRows):
            if message.lease == self._lease and self._server is not None and source in self._may_ask:
                self._answer(self._server, message, payloads)
        elif message.lease == self._lease and self._asked.get(message.request) == source:
            if isinstance(message, ExpertsRefused):
                self._answers[message.request] = message
            else:
                self._answers[message.request] = payloads[0] if len(payloads) == 1 else memoryview(b"")

    def _answer(self, server: PeerServer, asked: ExpertRows, payloads: Sequence[memoryview]) -> None:
        reply: ExpertMessage
        out: list[Frame] = []
        try:
            found = server.answer(asked.layer, payloads)
            reply, out = ExpertOutputs(asked.lease, asked.request), [found.data]
        except (ProtocolError, EngineError, ValueError) as problem:
            log.warning("a request for experts of layer %d was refused: %s", asked.layer, problem)
            reply = ExpertsRefused(asked.lease, asked.request, "protocol", str(problem))
        self.answered += 1
        if not self._need_mesh().try_answer(reply, out):
            log.warning("an answer about layer %d could not be sent", asked.layer)
