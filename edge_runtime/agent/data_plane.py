"""A device's part in a pipeline, on the compute thread's event loop: links to peers, rules of sessions, steps.

A frame that arrives here is decoded, judged and run, and its rows are sent on, without waking another thread. What
concerns the coordinator goes to the agent's own event loop and comes from there, in order.

Knows: how links, `pipeline_state` and the compute thread fit together. Does not know: the control link, loading, or
the rules themselves.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_runtime.agent.expert_links import ExpertLinks, ExpertMessage
from edge_runtime.agent.fast_path import FastPath
from edge_runtime.agent.peer_outbox import PeerMessage, PeerOutbox, SessionMessage
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    CancelRows,
    ControlLost,
    DropRows,
    Event,
    Ignore,
    Instruction,
    Load,
    Loaded,
    LoadFailed,
    OpenRows,
    Received,
    Retire,
    Rows,
    RunRows,
    Send,
    SessionBroke,
    Unload,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.agent.step_messages import bundled, parted, row_count
from edge_runtime.core import DeviceId, SessionId
from edge_runtime.engine.wire import FP32, packed, unpacked
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.expert_messages import ExpertRows
from edge_runtime.protocol.messages import (
    FrameRows,
    LoadStage,
    Message,
    PeerLease,
    StepRows,
    Tokens,
)
from edge_runtime.transport.base import Frame
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.mesh import Mesh
from edge_runtime.trust.identity import KeyPair

log = logging.getLogger(__name__)


class ControlSide(Protocol):
    """What the data plane asks of the agent. Called on the compute thread; nothing here waits."""

    def post(self, message: Message, payloads: Sequence[Frame]) -> None: ...
    def start_loading(self, order: LoadStage) -> None: ...
    def stop_loading(self) -> None: ...
    def broke(self, problem: Exception) -> None:
        """A bug: this device must not look alive any longer."""
        ...

    async def relay(self, message: Message, payloads: Sequence[Frame]) -> None:
        """As fast as the coordinator reads. Raises ConnectionClosed, TransportError."""
        ...


class DataPlane:
    """Methods in the first part are for the agent's loop; everything else happens on the compute thread."""

    def __init__(
        self, control: ControlSide, key: KeyPair, device_id: str, signing_key: bytes, data_address: str
    ) -> None:
        self.worker = StageWorker(self._handle_all, on_idle=self._prepare)
        self._control = control
        self._make_mesh: Callable[[], Mesh] = lambda: Mesh(
            key,
            device_id,
            signing_key,
            control.relay,
            data_address,
            on_message=self._arrived,
            look=self._look,
        )
        self._state = PipelineState()
        self.fast = FastPath(
            self._state,
            self.worker,
            self._way_to,
            self._way_from,
            self._row_in,
            self._frame_of_rows,
            self._broke,
        )
        self.experts = ExpertLinks()
        self._of_step: list[Send] | None = (
            None  # rows and ids of a step of several sessions, until all are there
        )
        self._hidden_size = 0  # these two of the stage that is loaded
        self._wire = FP32

    # ------------------------------------------------------------ from the agent's loop

    def received(self, message: Message) -> None:
        """Of the coordinator."""
        self._later(self._handle, Received(COORDINATOR, message))

    def relayed(self, source: str, payloads: Sequence[memoryview]) -> None:
        self._later(lambda: self._mesh.relayed(source, payloads))

    def lease(self, lease: PeerLease) -> None:
        self._later(self._apply_lease, lease)

    def control_lost(self) -> None:
        self._later(self._control_lost)

    def loaded(self, event: Loaded, hidden_size: int, wire: str) -> None:
        self._later(self._loaded, event, hidden_size, wire)

    def load_failed(self, event: LoadFailed) -> None:
        self._later(self._handle, event)

    def _later(self, work: Callable[..., None], *arguments: object) -> None:
        """On the compute thread, between two steps and in order."""
        self.worker.put(functools.partial(self._guarded, functools.partial(work, *arguments)))

    # ------------------------------------------------------------ on the compute thread

    async def run(self, opened: Callable[[str], None]) -> None:
        """Until cancelled. `opened` is told where peers may dial, once they may."""
        async with self._make_mesh() as mesh, asyncio.TaskGroup() as tasks:
            self._mesh = mesh
            self.experts.opened(mesh, tasks)
            self._peers = PeerOutbox(tasks, mesh.try_send, mesh.send, self._peer_lost)
            opened(mesh.data_address)
            await asyncio.get_running_loop().create_future()

    def _arrived(self, source: DeviceId, message: Message, payloads: Sequence[memoryview]) -> None:
        if isinstance(message, ExpertMessage):
            self.experts.arrived(source, message, payloads)
            self.worker.stage.steps += isinstance(message, ExpertRows)
            return
        count = row_count(message)
        rows = unpacked(payloads[0], self._wire, count, self._hidden_size) if count and payloads else None
        for each, its_rows in parted(message, rows if len(payloads) == 1 else None):
            self._handle(Received(source, each, its_rows))

    def _look(self, source: DeviceId, frames: Sequence[memoryview]) -> Callable[[], None] | None:
        """At what comes, before it is taken; then it arrives, and then what is returned is called."""
        return self.fast.look(source, frames)

    def _prepare(self) -> None:
        self.fast.prepare()

    def _way_to(self, device_id: str) -> Channel | None:
        return self._mesh.ready(device_id) if self._peers.is_clear(device_id) else None

    def _way_from(self, device_id: str) -> Channel | None:
        return self._mesh.heard_on(device_id)

    def _apply_lease(self, lease: PeerLease) -> None:
        try:
            body = self._mesh.apply_lease(lease)
        except EdgeRuntimeError as problem:
            log.error("a peer lease was refused: %s", problem.message)
            return
        log.info("lease %d: %d peers", body.number, len(body.peers))

    def _control_lost(self) -> None:
        self._mesh.control_lost()
        self._handle(ControlLost())

    def _loaded(self, event: Loaded, hidden_size: int, wire: str) -> None:
        self._hidden_size, self._wire = hidden_size, wire
        self._handle(event)

    def _peer_lost(self, message: SessionMessage, reason: str) -> None:
        self._handle(SessionBroke(message.lease, SessionId(message.session), "transport", reason))

    def _handle_all(self, events: Sequence[Event]) -> None:
        """What a step made, or what happened beside one."""
        self._of_step = [] if len(events) > 1 else None
        for event in events:
            self._handle(event)
        sends, self._of_step = self._of_step, None
        if sends:
            self._guarded(functools.partial(self._send_all, bundled(sends)))

    def _handle(self, event: Event) -> None:
        try:
            for instruction in self._state.handle(event):
                self._carry_out(instruction)
        except Exception as problem:
            self._broke(problem)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as problem:
            self._broke(problem)

    def _broke(self, problem: Exception) -> None:
        log.error("lease %d: an event could not be handled", self._state.lease, exc_info=problem)
        self._control.broke(problem)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case RunRows() if self.fast.takes(instruction):
                pass
            case OpenRows() | RunRows() | CancelRows() | DropRows():
                self.worker.put(instruction)
            case Send(message=FrameRows() | Tokens()) if self._of_step is not None:
                self._of_step.append(instruction)
            case Send():
                self._send_all([instruction])
            case Load(order):
                self._peers.clear()
                self.experts.end()
                self.worker.retire()
                self._control.start_loading(order)
            case Retire():
                self._end_plan()
                self.worker.retire()
            case Unload(lease):
                log.info("lease %d: unloaded", lease)
                self._end_plan()
                self.worker.unload()
            case Ignore(reason):
                log.debug("lease %d: dropped: %s", self._state.lease, reason)

    def _end_plan(self) -> None:
        self._peers.clear()
        self.experts.end()
        self._control.stop_loading()

    def _send_all(self, sends: Sequence[Send]) -> None:
        for to, message, rows in ((each.to, each.message, each.rows) for each in sends):
            self._send(to, message, [] if rows is None else [self._frame_of(message, rows)])

    def _send(self, to: str, message: Message, payloads: Sequence[Frame]) -> None:
        if to == COORDINATOR:
            self._control.post(message, payloads)
        elif isinstance(message, PeerMessage) and not self.fast.was_sent(to, message):
            self._peers.post(to, message, payloads)

    def _frame_of(self, message: Message, rows: Rows) -> memoryview:
        return packed(
            rows if rows.ndim == 2 else rows[None],
            self._wire if isinstance(message, FrameRows | StepRows) else FP32,
        )

    def _row_in(self, frame: memoryview) -> Rows | None:
        return unpacked(frame, self._wire, 1, self._hidden_size)

    def _frame_of_rows(self, rows: Rows) -> memoryview:
        return packed(rows, self._wire)
