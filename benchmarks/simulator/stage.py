"""One stage: the real state machine, queue of rows and tail around toy layers that take virtual time.

Knows: instructions, layers' numbers, how long a step takes. Does not know: links, or who else there is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.model import VOCABULARY, layer_row, logits_of
from edge_runtime.agent.pipeline_events import (
    CancelRows,
    DropRows,
    Event,
    Load,
    Loaded,
    OpenRows,
    Rows,
    RunRows,
    Send,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SessionId
from edge_runtime.protocol.messages import Message

LateRows = Callable[[str, list[int], int], int]  # a stage, its ids, first row of a step: how many are late
Post = Callable[[str, str, Message, Rows | None], None]
PREFILL_ROWS = 64


class SimulatedStage:
    def __init__(
        self,
        name: str,
        clock: Clock,
        step_seconds: Callable[[int], float],
        post: Post,
        late_rows: LateRows,
    ) -> None:
        """`step_seconds`: of so many rows."""
        self.name = name
        self.rows_run = 0
        self.rows_late = 0  # begun although a miss before them could have been known here
        self._clock = clock
        self._step_seconds = step_seconds
        self._post = post
        self._late_rows = late_rows
        self._ids: dict[SessionId, list[int]] = {}  # of the rows that were run
        self._state = PipelineState()
        self._queue = RowQueue(PREFILL_ROWS)
        self._layers = range(0)
        self._caches: dict[SessionId, list[list[int]]] = {}  # one number per layer and row
        self._tails: dict[SessionId, TailSession] = {}
        self._is_busy = False

    def handle(self, event: Event) -> None:
        for instruction in self._state.handle(event):
            match instruction:
                case Send(to, message, rows):
                    self._post(self.name, to, message, rows)
                case Load(order):
                    self._queue = RowQueue(PREFILL_ROWS)
                    self._caches, self._tails = {}, {}
                    self._layers = range(order.first_layer, order.last_layer + 1)
                    self.handle(Loaded(order.lease, "toy", True, 1, 1 << 20, VOCABULARY))
                case OpenRows():
                    self._open(instruction)
                case RunRows(work):
                    self._queue.add(work)
                case CancelRows():
                    self._queue.cancel(instruction)
                case DropRows():
                    self._queue.drop(instruction.session)
                    self._caches.pop(instruction.session, None)
                case _:
                    pass
        self._begin_step()

    def _open(self, order: OpenRows) -> None:
        self._caches[order.session] = [[] for _ in self._layers]
        if order.sampling is not None:
            self._tails[order.session] = TailSession(order.sampling, VOCABULARY, order.prompt_rows)

    def _begin_step(self) -> None:
        if self._is_busy or not self._queue:
            return
        self._is_busy = True
        works = self._queue.take()
        rows = sum(work.row_count for work in works)
        seconds = self._step_seconds(rows)
        self.rows_run += rows
        for work in works:
            ids = self._ids.setdefault(work.session, [])
            ids[work.base_row :] = work.ids
            self.rows_late += self._late_rows(self.name, ids, work.base_row)
        done = [self._run(work) for work in works]
        self._clock.after(seconds, lambda: self._end_step(done))

    def _end_step(self, done: list[WorkFinished]) -> None:
        self._is_busy = False
        for event in done:
            self.handle(event)
        self._begin_step()

    def _run(self, work: Work) -> WorkFinished:
        if work.session not in self._caches:  # closed, or of another lease
            return WorkFinished(work)
        ids = work.ids + work.sides.ids
        values = list(ids) if work.hidden is None else [int(value) for value in work.hidden[:, 0]]
        for layer, cache in zip(self._layers, self._caches[work.session], strict=True):
            assert work.base_row <= len(cache), "a stage was given rows it can't place"
            del cache[work.base_row :]
            for index, value in enumerate(values[: len(work.ids)]):
                cache.append(layer_row(layer, cache[-1] if cache else 0, value))
                values[index] = cache[-1]
            for index, parent in enumerate(work.sides.parents, len(work.ids)):
                before = cache[parent] if parent >= 0 else values[len(work.ids) + ~parent]
                values[index] = layer_row(layer, before, values[index])
        tail = self._tails.get(work.session)
        if tail is not None:
            sampled_at = values[len(work.ids) - work.logit_rows :]
            logits = np.array([logits_of(value) for value in sampled_at], np.float32).reshape(-1, VOCABULARY)
            tokens = tail.sample(work.base_row, work.ids, logits, work.sides)
            return WorkFinished(work, None, tokens)
        return WorkFinished(work, np.array(values, np.float32)[:, None])
