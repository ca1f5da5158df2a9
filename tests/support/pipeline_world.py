"""A simulated coordinator and one to three toy stages, for one request at a time, over links that misbehave as told.

Knows: the coordinator's part of docs/protocol.md. Does not know: what is done to the links; tests choose.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import COORDINATOR, Received
from edge_runtime.core import SamplingParams
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import (
    NOBODY_ASKS,
    CloseSession,
    Feed,
    Gap,
    LoadStage,
    Message,
    OpenSession,
    SessionFailed,
    StageReady,
    Tokens,
    UnloadStage,
)
from tests.support.toy_stage import LAYERS, STOP_ID, VOCAB, Device, page_names


@dataclass
class Flight:
    source: str
    to: str
    message: Message
    rows: object


class Cluster:
    """The coordinator's part of docs/protocol.md for one request, and links that misbehave as told."""

    def __init__(self, prompt: list[int], max_rows: int, chunk: int) -> None:
        self.ids = list(prompt)
        self.prompt_rows = len(prompt)
        self.max_rows = max_rows
        self.chunk = chunk
        self.flights: list[Flight] = []
        self.delivered: list[Flight] = []
        self.devices = {name: Device(name, self.post) for name in "ABC"}
        self.lease = self.session = 0
        self.plan: tuple[str, ...] = ()
        self.finish = ""
        self.named = 0  # pages that the open session was told the names of
        self.failures: list[SessionFailed] = []
        self.ready: set[str] = set()

    def begin(self, prompt: list[int], max_rows: int) -> None:
        """Another request, on the same pipeline."""
        self.ids, self.prompt_rows, self.max_rows, self.finish = list(prompt), len(prompt), max_rows, ""
        self.feed()

    def post(self, source: str, to: str, message: Message, rows: object = None) -> None:
        self.flights.append(Flight(source, to, message, rows))

    def deliver(self, index: int) -> None:
        flight = self.flights.pop(index)
        self.delivered.append(flight)
        self.arrive(flight)

    def arrive(self, flight: Flight) -> None:
        if flight.to == COORDINATOR:
            self.at_coordinator(flight)
        else:
            self.devices[flight.to].handle(Received(flight.source, flight.message, flight.rows))

    def at_coordinator(self, flight: Flight) -> None:
        match flight.message:
            case StageReady(lease=self.lease):
                self.ready.add(flight.source)
                if self.ready == set(self.plan) and not self.session and not self.finish:
                    self.feed()
            case Tokens():
                for token in flight.message.tokens:
                    if token.position == len(self.ids) and not self.finish:
                        self.ids.append(token.id)
                        self.finish = token.finish
                    elif token.position < len(self.ids):
                        assert self.ids[token.position] == token.id, "a position got two ids"
            case Gap(session=self.session, lease=self.lease) if not self.finish:
                self.feed()
            case SessionFailed():
                self.failures.append(flight.message)

    def replan(self, order: str, stages: int, cuts: list[int]) -> None:
        for name in set(self.plan) - set(order[:stages]):
            self.post(COORDINATOR, name, UnloadStage(self.lease))
        self.lease += 1
        self.plan = tuple(order[:stages])
        self.ready.clear()
        self.session = 0
        edges = [0, *sorted(cuts)[: stages - 1], LAYERS]
        for stage, name in enumerate(self.plan):
            self.post(
                COORDINATOR,
                name,
                LoadStage(
                    self.lease,
                    "sha256:0",
                    stage,
                    self.plan,
                    edges[stage],
                    edges[stage + 1] - 1,
                    self.chunk,
                ),
            )

    def close(self) -> None:
        names = page_names(self.ids[:-1])[self.named :]
        ids = tuple(self.ids[self.named * PAGE_TOKENS : (self.named + len(names)) * PAGE_TOKENS])
        for name in self.plan:
            self.post(COORDINATOR, name, CloseSession(self.session, self.lease, b"".join(names), ids))

    def feed(self) -> None:
        """Close what runs and start again from the journalled ids, under a new session number."""
        if self.session:
            self.close()
        self.session = self.lease * 1000 + self.session % 1000 + 1
        names = page_names(self.ids[:-1])
        opened = OpenSession(
            self.session,
            self.lease,
            len(self.ids),
            self.prompt_rows,
            self.max_rows,
            (STOP_ID,),
            SamplingParams(temperature=0.0),
            "sampler",
            b"".join(names),
            len(names) * PAGE_TOKENS or NOBODY_ASKS,
        )
        self.named = len(names)
        self.post(COORDINATOR, self.plan[0], opened)
        middle = len(self.ids) // 2
        for base, ids in ((0, self.ids[:middle]), (middle, self.ids[middle:])):
            if ids:
                self.post(COORDINATOR, self.plan[0], Feed(self.session, self.lease, base, tuple(ids)))

    def step(self, choice: int) -> bool:
        """Deliver the oldest message or run some work; False once nothing is left to do."""
        busy = [d for d in self.devices.values() if d.queue]
        if busy and (choice % 2 or not self.flights):
            busy[choice % len(busy)].run(choice)
            return True
        if self.flights:
            self.deliver(0)
            return True
        return False

    def settle(self) -> None:
        """Links behave from now on; a stream that stands still is fed again, as the coordinator's timeout does."""
        for _ in range(200):
            while self.step(1):
                pass
            if self.finish or self.failures:
                break
            self.feed()
        if self.session:
            self.close()
        while self.step(0):
            pass


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
plans = st.tuples(st.permutations("ABC").map("".join), st.integers(1, 3), st.sampled_from([[1, 2]]))
