"""What every stage of a virtual world does: hand instructions on, and take virtual time for a step at a time.

Knows: the real state machine, the clock, counters. Does not know: rows and layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from benchmarks.simulator.clock import Clock
from edge_runtime.agent.pipeline_events import Event, Instruction, Load, Rows, Send
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.protocol.messages import LoadStage, Message

Post = Callable[[str, str, Message, Rows | None], None]
StepSeconds = Callable[[int], float]  # of so many rows
PREFILL_ROWS = 64


class WorldStage(ABC):
    def __init__(self, name: str, clock: Clock, step_seconds: StepSeconds, post: Post) -> None:
        self.name = name
        self.rows_run = 0
        self.rows_late = 0  # begun although a miss before them could have been known here
        self.rows_poisoned = 0  # made NaN once they were dead
        self._clock = clock
        self._step_seconds = step_seconds
        self._post = post
        self._state = PipelineState()
        self._is_busy = False

    def handle(self, event: Event) -> None:
        for instruction in self._state.handle(event):
            match instruction:
                case Send(to, message, rows):
                    self._post(self.name, to, message, rows)
                case Load(order):
                    self._load(order)
                case _:
                    self._obey(instruction)
        self._begin_step()

    def close(self) -> None:
        """Free the layers."""
        return None

    @abstractmethod
    def _load(self, order: LoadStage) -> None: ...

    @abstractmethod
    def _obey(self, instruction: Instruction) -> None:
        """What concerns rows; the rest is ignored."""

    @abstractmethod
    def _begin_step(self) -> None:
        """Take what waits, where there is something and no step runs."""

    def _take_time(self, rows: int, done: Sequence[Event]) -> None:
        """A step of `rows` rows has begun; when it is over, `done` is known."""
        self._is_busy = True
        self.rows_run += rows
        self._clock.after(self._step_seconds(rows), lambda: self._end_step(done))

    def _end_step(self, done: Sequence[Event]) -> None:
        self._is_busy = False
        for event in done:
            self.handle(event)
        self._begin_step()
