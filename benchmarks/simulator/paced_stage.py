"""One stage under load: the real state machine, queue of rows and pace around steps that only take virtual time.

Rows are counted, not computed: every id is the same.

Knows: instructions, how long a step takes. Does not know: links, requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.world_stage import Post, StepSeconds, WorldStage
from edge_runtime.agent.next_step import pause_seconds, take_step
from edge_runtime.agent.pipeline_events import (
    CancelRows,
    DropRows,
    Instruction,
    Loaded,
    OpenRows,
    RunRows,
    Work,
    WorkFinished,
)
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.step_pace import StepPace
from edge_runtime.core import Token
from edge_runtime.protocol.messages import LoadStage

VOCABULARY = 16
ONLY_ID = 5


@dataclass(frozen=True, slots=True)
class PacedStep:
    """What was in a step, and when."""

    began: float
    ended: float
    decode_rows: int
    prompt_rows: int


class PacedStage(WorldStage):
    def __init__(
        self,
        name: str,
        clock: Clock,
        step_seconds: StepSeconds,
        post: Post,
        pace: Callable[[bool], StepPace] = lambda is_first: StepPace(forms_groups=is_first),
    ) -> None:
        super().__init__(name, clock, step_seconds, post)
        self.steps: list[PacedStep] = []
        self._make_pace = pace
        self._queue, self._pace = RowQueue(1), pace(True)
        self._is_tail = False
        self._decode_came_at: float | None = None
        self._turn_at: float | None = None

    def _load(self, order: LoadStage) -> None:
        self._queue = RowQueue(order.prefill_chunk_tokens)
        self._pace = self._make_pace(order.stage == 0)
        self._is_tail = order.stage == len(order.devices) - 1
        self.handle(Loaded(order.lease, "counted", True, 1, 1 << 20, VOCABULARY))

    def _obey(self, instruction: Instruction) -> None:
        match instruction:
            case RunRows(work):
                self._queue.add(work)
                if work.is_decode:
                    now = self._clock.now_seconds
                    self._pace.came(work.session, now)
                    self._decode_came_at = now if self._decode_came_at is None else self._decode_came_at
            case CancelRows():
                self._queue.cancel(instruction)
            case DropRows(session=session):
                self._queue.drop(session)
                self._pace.left(session)
            case OpenRows():
                pass
            case _:
                pass

    def _begin_step(self) -> None:
        now = self._clock.now_seconds
        pause = None if self._is_busy else pause_seconds(self._queue, self._pace, now)
        if pause is None:
            return
        if pause > 0:
            self._come_back(now + pause)
            return
        came_at = self._decode_came_at
        if self._queue.decode_rows:
            self._decode_came_at = None
        works = take_step(self._queue, self._pace, now, came_at)
        assert works, "there was work, yet nothing was taken"
        self._run(works, now)

    def _come_back(self, at: float) -> None:
        if self._turn_at is None or at < self._turn_at or self._turn_at < self._clock.now_seconds:
            self._turn_at = at
            self._clock.after(at - self._clock.now_seconds + 1e-9, self._begin_step)

    def _run(self, works: list[Work], began: float) -> None:
        self._is_busy = True
        decode = [work for work in works if work.is_decode]
        decode_rows = sum(work.row_count for work in decode)
        rows = sum(work.row_count for work in works)
        self.rows_run += rows
        seconds = self._step_seconds(rows)

        def ended() -> None:
            self._is_busy = False
            sessions = [work.session for work in decode if work.row_count == 1]
            now = self._clock.now_seconds
            self._pace.ended(decode_rows, rows - decode_rows, seconds, now, sessions)
            self.steps.append(PacedStep(began, now, decode_rows, rows - decode_rows))
            for work in works:
                self.handle(self._finished(work))
            self._begin_step()

        self._clock.after(seconds, ended)

    def _finished(self, work: Work) -> WorkFinished:
        if not self._is_tail:
            return WorkFinished(work, np.zeros((work.row_count, 1), np.float32))
        end = work.base_row + len(work.ids)
        tokens = tuple(Token(end - n, ONLY_ID) for n in range(work.logit_rows - 1, -1, -1))
        return WorkFinished(work, None, tokens)
