"""A stage of the virtual world with the agent's own compute side: queue, pace, samplers and real layers.

The worker's commands and steps are called one by one instead of by its thread; only time is virtual. Rows of a session
become NaN as soon as they are known to be dead, and so is all memory of keys and values before it is written: whatever
was read of them would be NaN, too, and the sampler refuses that.

Knows: the worker's commands, how long a step takes. Does not know: links, who else there is, what layers compute.
"""

from __future__ import annotations

import numpy as np

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.world_stage import PREFILL_ROWS, Post, StepSeconds, WorldStage
from edge_runtime.agent.pipeline_events import (
    CancelRows,
    DropRows,
    Instruction,
    Loaded,
    OpenRows,
    RunRows,
    SessionBroke,
    StageBroke,
)
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.stage_steps import LoadedStage, StageSteps
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import LoadStage

KV_BYTES = 8 << 20


class CpuWorldStage(WorldStage):
    """Where `SimulatedStage` stands in a world."""

    def __init__(
        self, name: str, bundle: Bundle, clock: Clock, step_seconds: StepSeconds, post: Post
    ) -> None:
        """Late rows are not counted here."""
        super().__init__(name, clock, step_seconds, post)
        self._bundle = bundle
        self._steps = StageSteps(self._deliver, lambda: clock.now_seconds)
        self._loaded: LoadedStage | None = None
        self._stage: CpuStage | None = None

    def _obey(self, instruction: Instruction) -> None:
        if isinstance(instruction, OpenRows | RunRows | CancelRows | DropRows):
            self._steps.obey(instruction)
        if isinstance(instruction, CancelRows):
            self._poison(instruction.session, instruction.turn)

    def close(self) -> None:
        retired = self._steps.take_retired()
        if retired is not None:
            retired.close()

    def _load(self, order: LoadStage) -> None:
        retired = self._steps.take_retired()
        if retired is not None:
            retired.close()
        layers = LayerRange(order.first_layer, order.last_layer)
        self._stage = CpuStage.load(self._bundle, layers, threads=1, kv_budget_bytes=KV_BYTES)
        self._stage._cache.pool[:] = np.nan
        vocab_size = self._bundle.manifest.model.vocab_size
        is_tail = order.stage == len(order.devices) - 1
        queue = RowQueue(PREFILL_ROWS)
        self._loaded = LoadedStage(
            order.lease,
            self._stage,
            is_tail=is_tail,
            vocab_size=vocab_size,
            queue=queue,
            is_first=order.stage == 0,
        )
        self._steps.install(self._loaded)
        self.handle(Loaded(order.lease, "cpu", True, 1, self._stage.kv_capacity_tokens, vocab_size))

    def _deliver(self, events: object) -> None:
        raise AssertionError(f"a stage failed beside its steps: {events}")

    def _begin_step(self) -> None:
        if self._is_busy or self._loaded is None or not self._loaded.queue:
            return
        pause_seconds = self._steps.pause_seconds()
        if pause_seconds:
            self._clock.after(pause_seconds, self._begin_step)
            return
        waiting = _rows_in(self._loaded.queue)
        step = self._steps.step()
        assert step is not None
        step.note()
        broken = next((event for event in step.events if isinstance(event, SessionBroke | StageBroke)), None)
        assert broken is None, f"a step failed: {broken}"
        self._take_time(waiting - _rows_in(self._loaded.queue), step.events)

    def _poison(self, session: SessionId, first: int) -> None:
        """Rows from `first` on, in every layer."""
        if self._stage is None or self._loaded is None or session not in self._loaded.open:
            return
        pages = self._stage._cache.table.get(session).pages
        for row in range(first, self._stage.rows(session)):
            self._stage._cache.pool[pages[row // PAGE_TOKENS], :, :, row % PAGE_TOKENS] = np.nan
            self.rows_poisoned += 1


def _rows_in(queue: RowQueue) -> int:
    return sum(work.row_count for works in queue._works.values() for work in works)
