"""Whatever the links do, a pipeline commits the ids that a plain loop over the model commits.

A simulated coordinator and one to three stages, each a real PipelineState, around a toy model whose rows depend on
everything before them. The links reorder, repeat and delay at will; plans change under way; stages keep pages for the
next request and forget them when they like, and run works in pieces.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    CancelRows,
    DropRows,
    Ignore,
    Load,
    Loaded,
    OpenRows,
    Received,
    RowsOpened,
    RunRows,
    Send,
    Unload,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import CHUNKS_UNDER_WAY, PipelineState
from edge_runtime.agent.row_queue import still_wanted
from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import (
    NOBODY_ASKS,
    PAGE_NAME_BYTES,
    CloseSession,
    Feed,
    FrameRows,
    Gap,
    LoadStage,
    Message,
    OpenSession,
    RowsHeld,
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


def page_names(ids: list[int]) -> list[bytes]:
    """Of the full pages: equal where everything before is equal."""
    ends = range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)
    return [hashlib.sha256(repr(ids[:end]).encode()).digest()[:PAGE_NAME_BYTES] for end in ends]


@dataclass
class Held:
    """What a toy engine keeps of a session: its ids, and one value per row and layer."""

    ids: list[int]
    layers: list[list[int]]
    names: list[bytes]


def after_cancel(work: Work | RowsOpened, order: CancelRows) -> list[Work | RowsOpened]:
    if isinstance(work, RowsOpened) or work.session != order.session:
        return [work]
    return [*still_wanted((work,), order)]


@dataclass
class Device:
    """A PipelineState, its queue of work and a toy engine."""

    name: str
    send: Callable[[str, str, Message, object], None]
    state: PipelineState = field(default_factory=PipelineState)
    queue: list[Work | RowsOpened] = field(default_factory=list)
    kv: dict[SessionId, Held] = field(default_factory=dict)
    pages: dict[bytes, tuple[list[int], list[list[int]]]] = field(default_factory=dict)  # rows of a page
    layers: range = range(0)
    ignored: int = 0
    reused_rows: int = 0
    most_queued_rows: int = 0

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
                    self.open(instruction)
                case RunRows(work):
                    self.queue.append(work)
                    waiting = sum(len(w.ids) for w in self.queue if isinstance(w, Work))
                    self.most_queued_rows = max(self.most_queued_rows, waiting)
                case CancelRows():
                    self.queue = [kept for w in self.queue for kept in after_cancel(w, instruction)]
                case DropRows():
                    self.queue = [w for w in self.queue if w.session != instruction.session]
                    self.drop(instruction)
                case Ignore():
                    self.ignored += 1

    def reset(self) -> None:
        self.queue.clear()
        self.kv.clear()
        self.pages.clear()

    def open(self, order: OpenRows) -> None:
        assert order.session not in self.kv, "opened twice"
        held = self.kv[order.session] = Held([], [[] for _ in self.layers], list(order.page_names))
        for name in order.page_names:
            if name not in self.pages:
                break
            ids, values = self.pages[name]
            held.ids += ids
            for layer, more in zip(held.layers, values, strict=True):
                layer += more
        if order.page_names:
            self.queue.append(RowsOpened(self.state.lease, order.session, len(held.ids)))

    def drop(self, order: DropRows) -> None:
        held = self.kv.pop(order.session, None)
        if held is None:
            return
        start = order.first_page * PAGE_TOKENS
        same = held.ids[start : start + len(order.ids)]
        while same != list(order.ids[: len(same)]):
            same.pop()
        held.names = held.names[: order.first_page] + list(order.page_names)
        self.keep(held, min(len(held.ids), start + len(same)))

    def keep(self, held: Held, rows: int) -> None:
        """Pages that are full of rows below `rows` outlive the session."""
        for index, name in enumerate(held.names[: rows // PAGE_TOKENS]):
            part = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
            self.pages.setdefault(name, (held.ids[part], [layer[part] for layer in held.layers]))

    def forget(self, rng: random.Random) -> None:
        for name in [name for name in self.pages if rng.random() < 0.5]:
            del self.pages[name]

    def run(self, choice: int) -> None:
        """One step of the engine: the oldest work of some session, or a first piece of it."""
        sessions = list(dict.fromkeys(w.session for w in self.queue))
        session = sessions[choice % len(sessions)]
        index, work = next((i, w) for i, w in enumerate(self.queue) if w.session == session)
        if isinstance(work, RowsOpened):
            del self.queue[index]
            self.reused_rows += work.rows
            self.handle(work)
            return
        if work.is_divisible and len(work.ids) > 1 and choice % 3 == 0:
            work, self.queue[index] = work.split(1 + choice % (len(work.ids) - 1))
        else:
            del self.queue[index]
        held = self.kv[session]
        assert work.turn >= self.state.sessions[session].turn, "a dead row was started"
        assert work.base_row <= len(held.ids), "a stage was given rows it can't place"
        held.ids[work.base_row :] = work.ids
        values = (
            list(work.ids + work.sides.ids) if work.hidden is None else [int(v) for v in work.hidden[:, 0]]
        )
        count = len(work.ids)
        for layer, cache in zip(self.layers, held.layers, strict=True):
            del cache[work.base_row :]
            cache += values[:count]
            seen = [
                [*cache[: left_at + 1], *(values[count + side] for side in path)]
                for left_at, path in map(work.sides.path, range(len(work.sides)))
            ]
            values = [layer_row(layer, cache[: work.base_row + i + 1]) for i in range(count)]
            values += [layer_row(layer, history) for history in seen]
        self.keep(held, len(held.ids))
        rows = np.array(values, np.float32)[:, None]
        self.handle(WorkFinished(work, rows, self.sampled(work, values)))

    @staticmethod
    def sampled(work: Work, values: list[int]) -> tuple[Token, ...]:
        """As TailSession says."""
        count, tokens = len(work.ids), []
        parent = work.base_row + count - work.logit_rows - 1
        for index in range(count - work.logit_rows, count):
            if tokens and work.ids[index] != tokens[-1].id:
                break
            parent += 1
            tokens.append(Token(parent + 1, values[index] % VOCAB))
        while tokens and (side := work.sides.child(parent, tokens[-1].id)) is not None:
            tokens.append(Token(tokens[-1].position + 1, values[count + side] % VOCAB))
            parent = ~side
        return tuple(tokens)


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


@settings(max_examples=150, deadline=None)
@given(
    plans,
    st.sampled_from([5, 16, 32, 40]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(0, 2**32),
)
def test_requests_that_begin_alike_share_rows_and_nothing_else(
    plan: tuple[str, int, list[int]], chunk: int, mischief: float, seed: int
) -> None:
    """Stages forget pages as they like, links misbehave: the ids are always those of a request that came alone."""
    rng = random.Random(seed)
    beginning = [rng.randrange(VOCAB) for _ in range(96)]
    cluster = Cluster(beginning[:1], 3, chunk)
    cluster.replan(*plan)
    cluster.settle()
    for _ in range(4):
        prompt = beginning[: rng.randint(1, 96)] + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))]
        max_rows = len(prompt) + rng.randint(1, 40)
        cluster.begin(prompt, max_rows)
        for _ in range(rng.randint(0, 60)):
            if rng.random() >= mischief:
                cluster.step(rng.randrange(1000))
            elif rng.random() < 0.3:
                rng.choice(list(cluster.devices.values())).forget(rng)
            elif cluster.flights:
                flight = rng.choice(cluster.flights)
                if rng.random() < 0.5:
                    cluster.arrive(flight)
                elif not isinstance(flight.message, CloseSession):
                    cluster.flights.remove(flight)
        cluster.settle()
        assert not cluster.failures
        assert cluster.ids == plain_loop(prompt, max_rows)
        assert not any(device.kv or device.queue for device in cluster.devices.values())


def test_rows_are_reused_by_every_stage_as_far_as_all_hold_them() -> None:
    cluster = Cluster([1], 2, 16)
    cluster.replan("ABC", 3, [1, 2])
    cluster.settle()
    prompt = [n % VOCAB for n in range(100)]
    cluster.begin(prompt, 104)
    cluster.settle()
    rest = page_names(prompt)[1:]
    assert all(set(page_names(prompt)) <= device.pages.keys() for device in cluster.devices.values())
    for name in rest:
        del cluster.devices["B"].pages[name]
    cluster.delivered.clear()
    cluster.begin([*prompt, 5], 104)
    cluster.settle()
    assert cluster.ids == plain_loop([*prompt, 5], 104)
    reused = [f.message for f in cluster.delivered if isinstance(f.message, RowsHeld) and f.message.reused]
    assert [message.rows for message in reused] == [32, 32]  # to stage 1 and to the coordinator
    frames = [f.message for f in cluster.delivered if isinstance(f.message, FrameRows)]
    assert min(frame.base_row for frame in frames) == 32


def test_a_long_prompt_never_piles_up_before_a_slow_stage() -> None:
    """Stage 2 stands still: stage 1 stops at its window, and goes on when rows come through."""
    cluster = Cluster([1], 2, 8)
    cluster.replan("AB", 2, [1])
    cluster.settle()
    prompt = [n % VOCAB for n in range(900)]
    cluster.begin(prompt, 902)
    for _ in range(2000):
        if cluster.devices["A"].queue:
            cluster.devices["A"].run(1)
        elif cluster.flights:
            cluster.deliver(0)
    waiting = sum(len(work.ids) for work in cluster.devices["B"].queue if isinstance(work, Work))
    assert 8 <= waiting <= CHUNKS_UNDER_WAY * 2 * 8
    cluster.settle()
    assert cluster.ids == plain_loop(prompt, 902)
    assert cluster.devices["B"].most_queued_rows <= CHUNKS_UNDER_WAY * 2 * 8 + 1
