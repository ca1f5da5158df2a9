"""Several requests on one target in one virtual world: who drafts, who does not, and who floods.

The delay lies between the stages. Every user's drafts pass the coordinator's real ledger, and every device hears the
load that the coordinator would tell it.

Knows: the coordinator's part for many sessions without faults. Does not know: figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.simulator.clock import Clock
from benchmarks.simulator.device import DraftingDevice
from benchmarks.simulator.model import LAYERS, VOCABULARY, DialDrafter
from benchmarks.simulator.stage import SimulatedStage
from coordinator.planning.model import Plan, StagePlan
from coordinator.scheduling.draft_load import draft_load
from coordinator.sessions.draft_ledger import DraftLedger
from edge_runtime.agent.pipeline_events import COORDINATOR, Received, Rows
from edge_runtime.core import LayerRange, SamplingParams
from edge_runtime.protocol.messages import (
    Draft,
    Feed,
    LoadStage,
    Message,
    OpenSession,
    SessionFailed,
    StageReady,
    Tokens,
)
from edge_runtime.speculative.controller import Controller
from edge_runtime.speculative.draft_loop import DraftLoop
from edge_runtime.speculative.wire import CommittedEncoder, CommittedFrame, DraftDecoder

LEASE = 1
MAX_ROWS = 1 << 14
LONGEST_SECONDS = 1e4
FLOOD_IDS = 16  # of a frame


@dataclass(frozen=True, slots=True)
class User:
    """`acceptance` of its drafter; None: it does not draft.

    `floods`: so often a second it sends wrong ids, and ids for positions far in the future, whatever it hears.
    """

    acceptance: float | None = None
    floods: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """A step of so many rows takes `step_seconds + rows * row_seconds` on each of the stages."""

    stages: int = 2
    step_seconds: float = 0.004
    row_seconds: float = 0.004
    loop_delay_seconds: float = 0.02
    draft_seconds: float = 0.004

    def seconds(self, rows: int) -> float:
        return self.step_seconds + rows * self.row_seconds

    @property
    def plan(self) -> Plan:
        hop = self.loop_delay_seconds / self.stages
        parts = [
            StagePlan(str(at), str(at), LayerRange(at, at), 1, 1, self.seconds(1), hop)
            for at in range(self.stages)
        ]
        return Plan(tuple(parts), 1.0, 1.0, (), {}, 16)


@dataclass(slots=True)
class Request:
    """One user's. `committed_at` seconds of each of its ids."""

    user: User
    ids: list[int]
    ledger: DraftLedger
    device: DraftingDevice | None = None
    committed_at: list[float] = field(default_factory=list)
    load_told: float = 0.0
    encoder: CommittedEncoder = field(default_factory=lambda: CommittedEncoder(VOCABULARY))
    decoder: DraftDecoder = field(default_factory=lambda: DraftDecoder(VOCABULARY, MAX_ROWS))

    def tokens_between(self, begin_seconds: float, end_seconds: float) -> int:
        return sum(begin_seconds <= at < end_seconds for at in self.committed_at)


class Crowd:
    def __init__(self, users: Sequence[User], target: Target) -> None:
        self.clock = Clock()
        self.target = target
        self.load = draft_load(len(users), target.plan)
        self._names = tuple(f"stage-{index + 1}" for index in range(target.stages))
        self.stages = {
            name: SimulatedStage(name, self.clock, target.seconds, self._post, lambda *_: 0)
            for name in self._names
        }
        self._ready = 0
        self.requests = {number: self._request(number, user) for number, user in enumerate(users, 1)}

    def _request(self, number: int, user: User) -> Request:
        prompt = (3, 1, 4, 1, number)
        request = Request(user, list(prompt), DraftLedger(len(prompt), MAX_ROWS))
        if user.acceptance is not None:
            loop = DraftLoop(len(prompt), MAX_ROWS, VOCABULARY, Controller())
            greedy = SamplingParams(temperature=0.0)
            drafter = DialDrafter(user.acceptance, greedy, number)
            request.device = DraftingDevice(
                self.clock,
                loop,
                drafter,
                prompt,
                greedy,
                self.target.draft_seconds,
                lambda data: self._drafts(number, data),
                VOCABULARY,
            )
        return request

    def run(self, seconds: float) -> Crowd:
        """From the start of all requests until then."""
        edges = [index * LAYERS // self.target.stages for index in range(self.target.stages + 1)]
        for index, name in enumerate(self._names):
            order = LoadStage(LEASE, "sha256:0", index, self._names, edges[index], edges[index + 1] - 1, 16)
            self._post(COORDINATOR, name, order)
        self.clock.run(lambda: self.clock.now_seconds >= seconds, LONGEST_SECONDS)
        return self

    @property
    def rows_run(self) -> int:
        """Of the tail: one for each token, and those that were run for nothing."""
        return self.stages[self._names[-1]].rows_run

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        self.clock.after(seconds - self.clock.now_seconds, call)

    # ------------------------------------------------------------ links

    def _post(self, source: str, to: str, message: Message, rows: Rows | None = None) -> None:
        between = COORDINATOR not in (source, to) or source == self._names[-1]
        delay = self.target.loop_delay_seconds / self.target.stages if between else 0.0
        self.clock.after(delay, lambda: self._arrive(source, to, message, rows))

    def _arrive(self, source: str, to: str, message: Message, rows: Rows | None) -> None:
        if to != COORDINATOR:
            self.stages[to].handle(Received(source, message, rows))
            return
        match message:
            case StageReady():
                self._ready += 1
                if self._ready == len(self._names):
                    for number in self.requests:
                        self._feed(number)
            case Tokens():
                self._journal(message)
            case SessionFailed():
                raise AssertionError(f"a session failed: {message.reason}")
            case _:
                pass

    # ------------------------------------------------------------ the coordinator

    def _feed(self, number: int) -> None:
        request, first = self.requests[number], self._names[0]
        given, greedy = len(request.ids), SamplingParams(temperature=0.0)
        opened = OpenSession(number, LEASE, given, given, MAX_ROWS, (), greedy, "sampler")
        self._post(COORDINATOR, first, opened)
        self._post(COORDINATOR, first, Feed(number, LEASE, 0, tuple(request.ids)))
        if request.device is not None:
            request.device.start()
        if request.user.floods:
            self._flood(number)

    def _journal(self, message: Tokens) -> None:
        request = self.requests[message.session]
        before = len(request.ids)
        for token in message.tokens:
            if token.position == len(request.ids):
                request.ids.append(token.id)
                request.committed_at.append(self.clock.now_seconds)
                request.ledger.committed(token.id, self.load)
        if request.device is None or before == len(request.ids):
            return
        if request.load_told != self.load:
            request.load_told = self.load
            request.device.received(request.encoder.encode(CommittedFrame(0, (), load=self.load)))
        request.device.received(request.encoder.encode(CommittedFrame(before, tuple(request.ids[before:]))))

    def _drafts(self, number: int, data: bytes) -> None:
        frame = self.requests[number].decoder.decode(data)
        self._offer(number, Draft(number, LEASE, frame.turn, frame.base_row, frame.parents, frame.ids))

    def _offer(self, number: int, draft: Draft) -> None:
        offered = self.requests[number].ledger.offer(draft, self.load)
        if offered is not None:
            self._post(COORDINATOR, self._names[0], offered)

    def _flood(self, number: int) -> None:
        """Wrong ids for the next positions, for those after, and for ones that nobody can know yet."""
        request = self.requests[number]
        length, wrong = len(request.ids), (request.ids[-1] + 1) % VOCABULARY
        for base in (length, length + FLOOD_IDS, length + 5000):
            parents = tuple(range(base - 1, base - 1 + FLOOD_IDS))
            turn = max(request.ledger.turn, 0)
            self._offer(number, Draft(number, LEASE, turn, base, parents, (wrong,) * FLOOD_IDS))
        self.clock.after(1 / request.user.floods, lambda: self._flood(number))
