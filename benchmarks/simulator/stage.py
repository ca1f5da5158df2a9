"""One stage: the real state machine, queue of rows and tail around toy layers that take virtual time.

Knows: instructions, layers' numbers, how long a step takes. Does not know: links, or who else there is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.model import VOCABULARY, layer_row, logits_of
from benchmarks.simulator.world_stage import PREFILL_ROWS, Post, StepSeconds, WorldStage
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
from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SessionId
from edge_runtime.protocol.messages import LoadStage

LateRows = Callable[[str, list[int], int], int]  # a stage, its ids, first row of a step: how many are late


class SimulatedStage(WorldStage):
    def __init__(
        self,
        name: str,
        clock: Clock,
        step_seconds: StepSeconds,
        post: Post,
        late_rows: LateRows,
    ) -> None:
        super().__init__(name, clock, step_seconds, post)
        self._late_rows = late_rows
        self._ids: dict[SessionId, list[int]] = {}  # of the rows that were run
        self._queue = RowQueue(PREFILL_ROWS)
        self._layers = range(0)
        self._caches: dict[SessionId, list[list[int]]] = {}  # one number per layer and row
        self._tails: dict[SessionId, TailSession] = {}

    def _load(self, order: LoadStage) -> None:
        self._queue = RowQueue(PREFILL_ROWS)
        self._caches, self._tails = {}, {}
        self._layers = range(order.first_layer, order.last_layer + 1)
        self.handle(Loaded(order.lease, "toy", True, 1, 1 << 20, VOCABULARY))

    def _obey(self, instruction: Instruction) -> None:
        match instruction:
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

    def _open(self, order: OpenRows) -> None:
        self._caches[order.session] = [[] for _ in self._layers]
        if order.sampling is not None:
            self._tails[order.session] = TailSession(order.sampling, VOCABULARY, order.prompt_rows)

    def _begin_step(self) -> None:
        if self._is_busy or not self._queue:
            return
        works = self._queue.take()
        for work in works:
            ids = self._ids.setdefault(work.session, [])
            ids[work.base_row :] = work.ids
            self.rows_late += self._late_rows(self.name, ids, work.base_row)
        done = [self._run(work) for work in works]
        self._take_time(sum(work.row_count for work in works), done)

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
