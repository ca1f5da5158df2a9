"""One request in one virtual world: a device that drafts, a coordinator, stages, and the delays between them.

Two topologies of the same loop time: `ring`, the delay lies between the stages, and every id goes round it; `site`, the
target sits in one place, and the delay lies between it and the device.

Knows: who is where, and the coordinator's part of docs/speculative.md. Does not know: figures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.device import DraftingDevice
from benchmarks.simulator.model import LAYERS, VOCABULARY, DialDrafter
from benchmarks.simulator.stage import SimulatedStage
from benchmarks.simulator.world_stage import WorldStage
from edge_runtime.agent.pipeline_events import COORDINATOR, Received, Rows
from edge_runtime.core import SamplingParams
from edge_runtime.protocol.messages import (
    CloseSession,
    Draft,
    Feed,
    Fence,
    Gap,
    LoadStage,
    Message,
    OpenSession,
    SessionFailed,
    StageReady,
    Tokens,
)
from edge_runtime.speculative.controller import Controller, Limits
from edge_runtime.speculative.draft_loop import DraftLoop
from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.wire import CommittedEncoder, CommittedFrame, DraftDecoder

STEP_SECONDS = 0.010  # of a stage, and ROW_SECONDS for each row of it: Tv(k) = 40 ms + 0.2 k over four stages
ROW_SECONDS = 0.00005
LONGEST_SECONDS = 1e5


@dataclass(frozen=True, slots=True)
class Faults:
    """Of messages that may be lost: drafts on their way to stage 1, and fences. Chances in 0 .. 1 each."""

    lost: float = 0.0
    repeated: float = 0.0
    late: float = 0.0  # by up to LATE_SECONDS, so that others overtake it
    reconnect_seconds: float = 0.0  # the device's link breaks so often, all in flight on it is lost; 0: never
    replan_seconds: float = 0.0  # another lease, cut elsewhere, so often; 0: never
    seed: int = 0


LATE_SECONDS = 0.3
LONGEST_WINDOW = 600  # rows


@dataclass(frozen=True, slots=True)
class Setting:
    prompt: tuple[int, ...] = (3, 1, 4, 1, 5)
    new_tokens: int = 1000
    topology: str = "ring"  # or "site"
    loop_delay_seconds: float = 0.1
    stages: int = 4
    draft_seconds: float | None = 0.004  # None: nobody drafts
    acceptance: float = 0.85
    rescue: float = 0.4  # of misses, where there are side rows
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    limits: Limits = field(default_factory=Limits)
    faults: Faults = field(default_factory=Faults)

    @property
    def max_rows(self) -> int:
        return len(self.prompt) + self.new_tokens


class World:
    layers = LAYERS
    vocab_size = VOCABULARY

    def __init__(self, setting: Setting, drafter: Drafter | None = None) -> None:
        """`drafter`: one that has not begun; None: one with the setting's acceptance."""
        self.setting = setting
        self.clock = Clock()
        self.ids = list(setting.prompt)
        self.finish = ""
        self.first_token_seconds = 0.0
        self.down_bytes = 0
        self.leases = 0
        self._sampled_at: list[tuple[int, float]] = [(token, 0.0) for token in self.ids]  # and when
        self._rng = random.Random(setting.faults.seed)
        self._lease = self._session = 0
        self._ready: set[str] = set()
        self._sent = len(self.ids)  # ids the device was told
        self._link = 0
        self._names = tuple(f"stage-{index + 1}" for index in range(setting.stages))
        self.stages = {name: self._stage(name) for name in self._names}
        self.device: DraftingDevice | None = None
        self._connect()
        if setting.draft_seconds is not None:
            loop = DraftLoop(
                len(setting.prompt), setting.max_rows, self.vocab_size, Controller(setting.limits)
            )
            guesses: Drafter = drafter or DialDrafter(
                setting.acceptance, setting.sampling, setting.faults.seed, setting.rescue
            )
            self.device = DraftingDevice(
                self.clock,
                loop,
                guesses,
                setting.prompt,
                setting.sampling,
                setting.draft_seconds,
                self._up,
                self.vocab_size,
            )

    def _stage(self, name: str) -> WorldStage:
        return SimulatedStage(name, self.clock, self._step_seconds, self._post, self._late_rows)

    # ------------------------------------------------------------ the run

    def run(self) -> World:
        """To the last id. Raises TimeoutError where it stands still."""
        faults = self.setting.faults
        self._plan()
        if self.device is not None:
            self.device.start()
            if faults.reconnect_seconds:
                self.clock.after(faults.reconnect_seconds, self._break_link)
        if faults.replan_seconds:
            self.clock.after(faults.replan_seconds, self._plan_again)
        self.clock.run(lambda: bool(self.finish), LONGEST_SECONDS)
        return self

    @property
    def tokens_per_second(self) -> float:
        """After the first one."""
        count = len(self.ids) - len(self.setting.prompt) - 1
        return count / (self.clock.now_seconds - self.first_token_seconds)

    @property
    def sessions(self) -> int:
        """Of this lease: a second one is opened where a stage was left without rows."""
        return self._session % 1000

    @property
    def rows_run(self) -> int:
        return sum(stage.rows_run for stage in self.stages.values())

    @property
    def rows_late(self) -> int:
        return sum(stage.rows_late for stage in self.stages.values())

    @property
    def loop_seconds(self) -> float:
        """L: the delay and one row's way through all stages."""
        return self.setting.loop_delay_seconds + self.setting.stages * self._step_seconds(1)

    def _step_seconds(self, rows: int) -> float:
        return (STEP_SECONDS + rows * ROW_SECONDS) * 4 / self.setting.stages

    # ------------------------------------------------------------ links

    def _delay(self, source: str, to: str) -> float:
        between = COORDINATOR not in (source, to) or source == self._names[-1]
        is_ring = self.setting.topology == "ring" and between
        return self.setting.loop_delay_seconds / self.setting.stages if is_ring else 0.0

    def _post(self, source: str, to: str, message: Message, rows: Rows | None = None) -> None:
        if isinstance(message, Tokens):
            self._note(message)
        delay, faults, rng = self._delay(source, to), self.setting.faults, self._rng
        copies = 1
        if isinstance(message, Draft | Fence):
            copies = (rng.random() >= faults.lost) + (rng.random() < faults.repeated)
        for _ in range(copies):
            late = 0.0
            if isinstance(message, Draft | Fence) and rng.random() < faults.late:
                late = rng.random() * LATE_SECONDS
            self.clock.after(delay + late, lambda: self._arrive(source, to, message, rows))

    def _note(self, message: Tokens) -> None:
        """When the tail sampled an id for the first time."""
        for token in message.tokens:
            if token.position == len(self._sampled_at):
                self._sampled_at.append((token.id, self.clock.now_seconds))

    def _late_rows(self, stage: str, ids: list[int], base_row: int) -> int:
        """Of rows `base_row` and on: those behind an id whose miss a cancel could have told this stage by now."""
        told_until = self.clock.now_seconds - self._delay(self._names[-1], stage)
        for row in range(max(0, base_row - LONGEST_WINDOW), min(len(ids), len(self._sampled_at))):
            token, seconds = self._sampled_at[row]
            if ids[row] != token and seconds < told_until:
                return len(ids) - max(row, base_row)
        return 0

    def _arrive(self, source: str, to: str, message: Message, rows: Rows | None) -> None:
        if to == COORDINATOR:
            self._at_coordinator(source, message)
        else:
            self.stages[to].handle(Received(source, message, rows))

    def _connect(self) -> None:
        self._link += 1
        self._encoder = CommittedEncoder(self.vocab_size)
        self._decoder = DraftDecoder(self.vocab_size, self.setting.max_rows)

    @property
    def _link_seconds(self) -> float:
        return self.setting.loop_delay_seconds / 2 if self.setting.topology == "site" else 0.0

    def _up(self, data: bytes) -> None:
        link = self._link
        self.clock.after(self._link_seconds, lambda: self._drafts(link, data))

    def _down(self, data: bytes) -> None:
        link = self._link

        def arrive() -> None:
            if link == self._link and self.device is not None:
                self.device.received(data)

        self.down_bytes += len(data)
        self.clock.after(self._link_seconds, arrive)

    def _break_link(self) -> None:
        assert self.device is not None
        self._link += 1
        self.device.lost()
        self.clock.after(0.05, self._mend_link)

    def _mend_link(self) -> None:
        assert self.device is not None
        self._connect()
        self._sent = self.device.loop.length
        self.device.resumed()
        self._tell()
        self.clock.after(self.setting.faults.reconnect_seconds, self._break_link)

    # ------------------------------------------------------------ the coordinator

    def _plan(self) -> None:
        self._lease += 1
        self._session = 0
        self._ready.clear()
        edges = self._edges()
        for index, name in enumerate(self._names):
            order = LoadStage(
                self._lease, "sha256:0", index, self._names, edges[index], edges[index + 1] - 1, 16
            )
            self._post(COORDINATOR, name, order)

    def _edges(self) -> list[int]:
        """Where layers are cut: another place for each lease, where there is one."""
        edges = [index * self.layers // self.setting.stages for index in range(self.setting.stages + 1)]
        if self.setting.stages == 3:
            edges[1] += self._lease % 2
        return edges

    def _plan_again(self) -> None:
        self.leases += 1
        self._plan()
        self.clock.after(self.setting.faults.replan_seconds, self._plan_again)

    def _feed(self) -> None:
        if self._session:
            for name in self._names:
                self._post(COORDINATOR, name, CloseSession(self._session, self._lease))
        self._session = self._lease * 1000 + self._session % 1000 + 1
        setting, first = self.setting, self._names[0]
        opened = OpenSession(
            self._session,
            self._lease,
            len(self.ids),
            len(setting.prompt),
            setting.max_rows,
            (),
            setting.sampling,
            "sampler",
        )
        self._post(COORDINATOR, first, opened)
        self._post(COORDINATOR, first, Feed(self._session, self._lease, 0, tuple(self.ids)))

    def _at_coordinator(self, source: str, message: Message) -> None:
        match message:
            case StageReady(lease=self._lease):
                self._ready.add(source)
                if len(self._ready) == len(self._names) and not self._session:
                    self._feed()
            case Tokens():
                self._journal(message)
            case Gap(session=self._session, lease=self._lease):
                self._feed()
            case SessionFailed():
                raise AssertionError(f"a session failed: {message.reason}")
            case _:
                pass

    def _journal(self, message: Tokens) -> None:
        for token in message.tokens:
            if token.position == len(self.ids) and not self.finish:
                self.first_token_seconds = self.first_token_seconds or self.clock.now_seconds
                self.ids.append(token.id)
                self.finish = token.finish
            elif token.position < len(self.ids):
                assert self.ids[token.position] == token.id, "a position got two ids"
        self._tell()

    def _tell(self) -> None:
        if self.device is None or self._sent == len(self.ids):
            return
        frame = CommittedFrame(self._sent, tuple(self.ids[self._sent :]), self.finish)
        self._sent = len(self.ids)
        self._down(self._encoder.encode(frame))

    def _drafts(self, link: int, data: bytes) -> None:
        if link != self._link:
            return
        frame = self._decoder.decode(data)
        if not self._session:
            return
        draft = Draft(self._session, self._lease, frame.turn, frame.base_row, frame.parents, frame.ids)
        self._post(COORDINATOR, self._names[0], draft)
