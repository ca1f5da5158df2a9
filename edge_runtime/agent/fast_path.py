"""The short way of a row that was foreseen: compared, run and answered first, told to the rules afterwards.

After 25 ms of reading weights all code is cold, and what a hop costs is how much of it lies between a frame and its
step. While a stage is idle it prepares for the row that is due. When just that comes, the row runs and the answer goes
out. Then the message takes its ordinary way, through link, rules, queue and pace, where the step finds its result
(`ran_ahead`) and the answer is found to be sent; a moment later, since on a device of few cores, or on one that is both
stages, the answer's own way through threads and kernel would wait for it. Both ways do the same, in another order; if
they ever differed, the device would be broken, and says so.

Knows: what was prepared, what ran ahead. Does not know: the rules, sockets, what a row means.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence

from edge_runtime.agent.due_row import DueRow
from edge_runtime.agent.pipeline_events import Rows, RunRows
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.predicted_row import predicted_row
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.core import Token
from edge_runtime.engine.base import Batch
from edge_runtime.engine.wire import FP32
from edge_runtime.errors import ConnectionClosed, EdgeRuntimeError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import Message
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.expected import Expected

WAY_SECONDS = 0.001  # of an answer to the next stage: until then the cores are left to it
WAY_STEPS = 0.05  # likewise, but no longer than this share of a step

WayTo = Callable[[str], Channel | None]  # an open link with room, and nothing that waits for it


class FastPath:
    """Everything happens on the compute thread. `rows_of` and `frame_of`: between frames and rows of this plan."""

    def __init__(
        self,
        state: PipelineState,
        worker: StageWorker,
        way_to: WayTo,
        way_from: WayTo,
        rows_of: Callable[[memoryview], Rows | None],
        frame_of: Callable[[Rows], memoryview],
        broke: Callable[[Exception], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._state = state
        self._worker = worker
        self._way_to = way_to
        self._way_from = way_from
        self._rows_of = rows_of
        self._frame_of = frame_of
        self._broke = broke
        self._sleep = sleep
        self._due: DueRow | None = None
        self._width = 0, 0  # lease, numbers of its rows
        self._awaits_command = False  # of the row that ran ahead
        self._command: RunRows | None = None
        self._answer: tuple[str, bytes] | None = None  # that was sent, and is not asked for yet
        self.rows = 0  # that took this way

    def prepare(self) -> None:
        """The stage is idle."""
        self._due = None
        session = self._worker.stage.only_decoding
        if session is None:
            return
        row = predicted_row(self._state, session)
        channel = self._way_to(row.to) if row is not None else None
        if row is not None and channel is not None:
            due = self._due = DueRow(row, channel, self._width_of(row.lease))
            comes_on = self._way_from(row.source)
            if comes_on is not None:
                look = functools.partial(self._look_at_hole, due)
                comes_on.expect(Expected(due.pieces(comes_on.whole_head), due.place, look))

    def look(self, source: str, frames: Sequence[memoryview]) -> Callable[[], None] | None:
        """At a list before it takes its ordinary way. What is returned is to be called after that."""
        due = self._due
        if due is None or due.row.version != self._state.version or source != due.row.source:
            return None
        row = due.row
        token_id = row.id_in(frames)
        if token_id is None or not self._worker.is_idle:
            return None
        try:
            batch = due.batch(token_id, frames, self._rows_of)
            return None if batch is None else self._run(due, token_id, batch)
        except Exception as problem:
            self._broke(problem)
            return None

    def _look_at_hole(self, due: DueRow, hole: bytes) -> Callable[[], None] | None:
        """`look` at what is exactly the row that is due, its numbers in their place."""
        if due is not self._due or due.row.version != self._state.version or not self._worker.is_idle:
            return None
        token_id = due.row.id_of(hole)
        if token_id is None:
            return None
        try:
            return self._run(due, token_id, due.batch_in_place(token_id))
        except Exception as problem:
            self._broke(problem)
            return None

    def _run(self, due: DueRow, token_id: int, batch: Batch) -> Callable[[], None]:
        self._due, row = None, due.row
        answered: list[int] = []  # with which id

        def answer(rows: Rows | None, tokens: tuple[Token, ...]) -> None:
            try:
                said = row.answer(token_id, tokens)
                if said is not None and self._send(due, said, rows):
                    answered.append(said)
            except Exception as problem:
                self._broke(problem)

        ahead = self._worker.stage.run_ahead(batch, answer)
        for said in answered:
            self._answer = row.to, row.leaving.filled(said)
            self._sleep(min(WAY_SECONDS, WAY_STEPS * (ahead.ended_at - ahead.began_at)))
        self._awaits_command = True
        rows = batch.hidden if batch.hidden is not None else ahead.rows
        if rows is not None:
            self._width = row.lease, rows.shape[1]
        return self._settle

    def _width_of(self, lease: int) -> int:
        """Numbers of a row that lies in a frame as it does in memory; 0 where it does not, or none has come yet."""
        order = self._state.order
        is_memory = order is not None and order.wire == FP32 and sys.byteorder == "little"
        return self._width[1] if is_memory and self._width[0] == lease else 0

    def _send(self, due: DueRow, token_id: int, rows: Rows | None) -> bool:
        try:
            return due.send(token_id, rows, self._frame_of)
        except (ConnectionClosed, EdgeRuntimeError):
            return False  # the ordinary way finds out what is to be done

    def takes(self, command: RunRows) -> bool:
        """Whether it is the command for the row that ran ahead: it is obeyed when the rules are done."""
        if not self._awaits_command:
            return False
        self._awaits_command, self._command = False, command
        return True

    def was_sent(self, to: str, message: Message) -> bool:
        if self._answer is None or to != self._answer[0]:
            return False
        expected, self._answer = self._answer[1], None
        if codec.encode_message(message) != expected:
            raise RuntimeError(f"device {to} was sent another answer than {message}")
        return True

    def _settle(self) -> None:
        try:
            self._settle_row()
        except Exception as problem:
            self._broke(problem)

    def _settle_row(self) -> None:
        command, self._command = self._command, None
        self._awaits_command = False
        if command is None:
            raise RuntimeError("a row ran that the rules did not want")
        self.rows += 1
        self._worker.settle(command)
        if self._answer is not None:
            raise RuntimeError("an answer was sent that the rules did not want")
