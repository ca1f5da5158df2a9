"""Requests that arrive whether or not earlier ones are done, on a pipeline in virtual time.

Knows: the coordinator's part for many sessions without faults: open, feed, close. Does not know: figures, scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.arrivals import Arrival
from benchmarks.simulator.clock import Clock
from benchmarks.simulator.paced_stage import ONLY_ID, PacedStage
from benchmarks.streams import Stream
from edge_runtime.agent.pipeline_events import COORDINATOR, Received, Rows
from edge_runtime.core import SamplingParams
from edge_runtime.protocol.messages import (
    CloseSession,
    Feed,
    LoadStage,
    Message,
    OpenSession,
    SessionFailed,
    StageReady,
    Tokens,
)

LEASE = 1
HOP_SECONDS = 0.0012
CHUNK_TOKENS = 32
LONGEST_SECONDS = 1e4


class ManyUsers:
    """`stages`: seconds of a step of so many rows, of each stage. `at_once`: a closed loop of so many instead."""

    def __init__(
        self,
        wanted: Sequence[Arrival],
        stages: Sequence[Callable[[int], float]],
        *,
        at_once: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        make_stage: Callable[..., PacedStage] = PacedStage,
    ) -> None:
        self.clock = Clock()
        self.streams: dict[int, Stream] = {}
        self._names = tuple(f"stage-{index + 1}" for index in range(len(stages)))
        self.stages = {
            name: make_stage(name, self.clock, seconds, self._post)
            for name, seconds in zip(self._names, stages, strict=True)
        }
        self._wanted = list(wanted)
        self._at_once = at_once
        self._chunk_tokens = chunk_tokens
        self._ready = self._asked = self._ended = 0

    def run(self) -> list[Stream]:
        for index, name in enumerate(self._names):
            order = LoadStage(LEASE, "sha256:0", index, self._names, index, index, self._chunk_tokens)
            self._post(COORDINATOR, name, order)
        self.clock.run(lambda: self._ended == len(self._wanted), LONGEST_SECONDS)
        return list(self.streams.values())

    def _post(self, source: str, to: str, message: Message, rows: Rows | None = None) -> None:
        self.clock.after(HOP_SECONDS, lambda: self._arrive(source, to, message, rows))

    def _arrive(self, source: str, to: str, message: Message, rows: Rows | None) -> None:
        if to != COORDINATOR:
            self.stages[to].handle(Received(source, message, rows))
            return
        match message:
            case StageReady():
                self._ready += 1
                if self._ready == len(self._names):
                    self._begin()
            case Tokens():
                self._tokens(message)
            case SessionFailed():
                raise AssertionError(f"a session failed: {message.reason}")
            case _:
                pass

    def _begin(self) -> None:
        if self._at_once is None:
            for each in self._wanted:
                self.clock.after(each.at_seconds, self._ask)
        else:
            for _ in range(self._at_once):
                self._ask()

    def _ask(self) -> None:
        if self._asked == len(self._wanted):
            return
        arrival = self._wanted[self._asked]
        self._asked += 1
        number, prompt = self._asked, arrival.prompt_tokens
        self.streams[number] = Stream(prompt, self.clock.now_seconds)
        greedy = SamplingParams(temperature=0.0)
        opened = OpenSession(
            number, LEASE, prompt, prompt, prompt + arrival.new_tokens, (), greedy, "sampler"
        )
        self._post(COORDINATOR, self._names[0], opened)
        self._post(COORDINATOR, self._names[0], Feed(number, LEASE, 0, (ONLY_ID,) * prompt))

    def _tokens(self, message: Tokens) -> None:
        stream = self.streams[message.session]
        stream.token_times += [self.clock.now_seconds] * len(message.tokens)
        if message.tokens[-1].finish:
            stream.ended = self.clock.now_seconds
            self._ended += 1
            for name in self._names:
                self._post(COORDINATOR, name, CloseSession(message.session, LEASE))
            if self._at_once is not None:
                self._ask()
