"""Whatever the links do, a pipeline commits the ids that a plain loop over the model commits.

A simulated coordinator and one to three stages, each a real PipelineState, around a toy model whose rows depend on
everything before them. The links reorder, repeat and delay at will; plans change under way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    DropRows,
    Ignore,
    Load,
    Loaded,
    OpenRows,
    Received,
    RunRows,
    Send,
    Unload,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.protocol.messages import (
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

LAYERS = 3
VOCAB = 97
STOP_ID = 13
PRIME = 65521


def layer_row(layer: int, history: list[int]) -> int:
    return (31 * history[-1] + 17 * sum(history) + 7 * len(history) + layer) % PRIME


def plain_loop(prompt: list[int], max_rows: int) -> list[int]:
    """The specification: one row at a time, all layers, no stages."""
    ids = list(prompt)
    while len(ids) < max_rows:
        values = list(ids)
        for layer in range(LAYERS):
            values = [layer_row(layer, values[: i + 1]) for i in range(len(values))]
        ids.append(values[-1] % VOCAB)
        if ids[-1] == STOP_ID:
            break
    return ids


@dataclass
class Device:
    """A PipelineState, its queue of work and a toy engine."""

    name: str
    send: Callable[[str, str, Message, object], None]
    state: PipelineState = field(default_factory=PipelineState)
    queue: list[Work] = field(default_factory=list)
    kv: dict[SessionId, list[list[int]]] = field(default_factory=dict)
    layers: range = range(0)
    ignored: int = 0

    def handle(self, event: object) -> None:
        for instruction in self.state.handle(event):
            match instruction:
                case Send():
                    self.send(self.name, instruction.to, instruction.message, instruction.rows)
                case Load(order):
                    self.reset()
                    self.layers = range(order.first_layer, order.last_layer + 1)
                    self.handle(Loaded(order.lease, "toy", True, 1, 1000, VOCAB))
                case Unload():
                    self.reset()
                case OpenRows():
                    assert instruction.session not in self.kv, "opened twice"
                    self.kv[instruction.session] = [[] for _ in self.layers]
                case RunRows(work):
                    self.queue.append(work)
                case DropRows():
                    self.queue = [w for w in self.queue if w.session != instruction.session]
                    self.kv.pop(instruction.session, None)
                case Ignore():
                    self.ignored += 1

    def reset(self) -> None:
        self.queue.clear()
        self.kv.clear()

    def run(self, choice: int) -> None:
        """One step of the engine: the oldest work of some session."""
        sessions = list(dict.fromkeys(w.session for w in self.queue))
        session = sessions[choice % len(sessions)]
        work = next(w for w in self.queue if w.session == session)
        self.queue.remove(work)
        caches = self.kv[session]
        values = list(work.ids) if work.hidden is None else [int(v) for v in work.hidden[:, 0]]
        for layer, cache in zip(self.layers, caches, strict=True):
            assert work.base_row <= len(cache), "a stage was given rows it can't place"
            del cache[work.base_row :]
            for i, value in enumerate(values):
                cache.append(value)
                values[i] = layer_row(layer, cache)
        first = work.base_row + len(values) - work.logit_rows
        tokens = tuple(
            Token(first + i + 1, value % VOCAB)
            for i, value in enumerate(values[len(values) - work.logit_rows :])
        )
        rows = np.array(values, np.float32)[:, None]
        self.handle(WorkFinished(work, rows, tokens))


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
        self.failures: list[SessionFailed] = []
        self.ready: set[str] = set()

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
        for name in self.plan:
            self.post(COORDINATOR, name, CloseSession(self.session, self.lease))

    def feed(self) -> None:
        """Close what runs and start again from the journalled ids, under a new session number."""
        if self.session:
            self.close()
        self.session = self.lease * 1000 + self.session % 1000 + 1
        opened = OpenSession(
            self.session,
            self.lease,
            len(self.ids),
            self.prompt_rows,
            self.max_rows,
            (STOP_ID,),
            SamplingParams(temperature=0.0),
            "sampler",
        )
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
MISCHIEF = ("any", "any", "repeat", "replay", "lose", "replan")


@settings(max_examples=300, deadline=None)
@given(
    prompts,
    st.integers(1, 8),
    st.integers(1, 5),
    st.lists(plans, min_size=4, max_size=4),
    st.integers(0, 200),
    st.floats(0.0, 0.6),
    st.integers(0, 2**32),
)
def test_any_schedule_commits_the_ids_of_the_plain_loop(
    prompt: list[int],
    new_tokens: int,
    chunk: int,
    some_plans: list[tuple[str, int, list[int]]],
    num_actions: int,
    mischief: float,
    seed: int,
) -> None:
    """A seeded schedule: lists of actions drawn one by one come out too short to get into much trouble."""
    rng = random.Random(seed)
    max_rows = len(prompt) + new_tokens
    cluster = Cluster(prompt, max_rows, chunk)
    cluster.replan(*some_plans[0])
    waiting_plans = some_plans[1:]
    for _ in range(num_actions):
        what = rng.choice(MISCHIEF) if rng.random() < mischief else "step"
        if what == "step":
            cluster.step(rng.randrange(1000))
        elif what == "any" and cluster.flights:
            cluster.deliver(rng.randrange(len(cluster.flights)))
        elif what == "repeat" and cluster.flights:
            cluster.arrive(rng.choice(cluster.flights))
        elif what == "replay" and cluster.delivered:
            cluster.arrive(rng.choice(cluster.delivered))
        elif what == "lose" and cluster.flights:
            lost = rng.choice(cluster.flights)
            if not isinstance(lost.message, LoadStage | StageReady | CloseSession | UnloadStage):
                cluster.flights.remove(lost)
        elif what == "replan" and waiting_plans and not cluster.finish:
            cluster.replan(*waiting_plans.pop())
    while cluster.step(1):  # plans that are still on their way arrive
        pass
    cluster.settle()
    assert not cluster.failures
    assert cluster.ids == plain_loop(prompt, max_rows)
    assert cluster.finish == ("stop" if cluster.ids[-1] == STOP_ID else "length")
    for device in cluster.devices.values():
        assert not device.kv, "a session's KV outlived it"
        assert not device.queue


@settings(max_examples=60, deadline=None)
@given(prompts, st.integers(1, 6), plans, st.lists(st.integers(0, 10_000), max_size=60))
def test_a_late_duplicate_changes_nothing(
    prompt: list[int], new_tokens: int, plan: tuple[str, int, list[int]], late: list[int]
) -> None:
    cluster = Cluster(prompt, len(prompt) + new_tokens, chunk=3)
    cluster.replan(*plan)
    cluster.settle()
    expected = plain_loop(prompt, len(prompt) + new_tokens)
    assert cluster.ids == expected
    history = list(cluster.delivered)
    for index in late:
        cluster.arrive(history[index % len(history)])
        assert not any(device.queue or device.kv for device in cluster.devices.values())
    # a plan asked for again is answered again; nothing else may be said
    assert all(isinstance(flight.message, StageReady) for flight in cluster.flights)
    assert cluster.ids == expected


@settings(max_examples=60, deadline=None)
@given(prompts, st.integers(1, 6), plans, st.data())
def test_a_duplicate_during_the_run_changes_nothing(
    prompt: list[int], new_tokens: int, plan: tuple[str, int, list[int]], data: st.DataObject
) -> None:
    """Repeated messages alone never cost a re-feed: one session is enough."""
    cluster = Cluster(prompt, len(prompt) + new_tokens, chunk=2)
    cluster.replan(*plan)
    for _ in range(400):
        if cluster.delivered and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(cluster.delivered) - 1))
            cluster.arrive(cluster.delivered[index])
        if not cluster.step(data.draw(st.integers(0, 1))) or cluster.finish:
            break
    assert cluster.ids == plain_loop(prompt, len(prompt) + new_tokens)
    assert cluster.session == cluster.lease * 1000 + 1
