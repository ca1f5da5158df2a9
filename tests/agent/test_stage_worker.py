"""The compute thread, with a toy stage whose rows depend on everything before them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from edge_runtime.agent.pipeline_events import (
    DropRows,
    Event,
    OpenRows,
    RowsOpened,
    RunRows,
    SessionBroke,
    StageBroke,
    Work,
    WorkFinished,
)
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.stage_steps import LoadedStage
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Rows
from edge_runtime.errors import CapacityError, EngineError

VOCAB = 11
LEASE = 3


class ToyStage:
    """Logits of row r point at (sum of ids 0..r) mod VOCAB. Session 66 is refused, 77 crashes the engine."""

    layers = LayerRange(0, 0)
    numeric_class = "toy"
    weight_bytes = 1
    kv_capacity_tokens = 100

    def __init__(self) -> None:
        self.sessions: dict[SessionId, list[int]] = {}
        self.batches: list[Batch] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False
        self.pages_here = 0  # of those asked for
        self.kept: list[object] = []
        self.given_back = 0

    @property
    def spare_pages(self) -> int:
        return 0

    @property
    def kv_used_tokens(self) -> int:
        return sum(map(len, self.sessions.values()))

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        if max_rows > self.kv_capacity_tokens:
            raise CapacityError("no room")
        self.sessions[session] = [n % VOCAB for n in range(min(len(page_names), self.pages_here) * 32)]
        return self.sessions[session]

    def run(self, batch: Batch) -> Rows:
        self.entered.set()
        assert self.gate.wait(10)
        sessions = [span.session for span in batch.spans]
        if 66 in sessions:
            raise EngineError("session 66 has bad ids")
        if 77 in sessions:
            raise ZeroDivisionError("engine")
        self.batches.append(batch)
        logits = []
        for span in batch.spans:
            ids = self.sessions[span.session]
            del ids[span.base_row :]
            for index, token in enumerate(span.ids):
                ids.append(token)
                if index >= len(span.ids) - span.logit_rows:
                    row = np.zeros(VOCAB, np.float32)
                    row[sum(ids) % VOCAB] = 9
                    logits.append(row)
        return np.array(logits, np.float32).reshape(-1, VOCAB)

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        self.sessions.pop(session, None)

    def keep(self, *what: object) -> None:
        self.kept.append(what)

    def give_back(self, *, all_pages: bool = False) -> None:
        self.given_back += 1

    def close(self) -> None:
        self.closed = True


class Bench:
    """A worker around a toy tail, and the events it gave back."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.stage = ToyStage()
        self.worker = StageWorker(self.deliver)
        self.loaded = LoadedStage(LEASE, self.stage, is_tail=True, vocab_size=VOCAB, queue=RowQueue(4))
        self.worker.start()
        self.worker.put(lambda: self.worker.install(self.loaded))

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.put(event)

    def open(self, session: int, max_rows: int = 20) -> None:
        sampling = SamplingParams(temperature=0.0)
        self.worker.put(OpenRows(LEASE, SessionId(session), max_rows, 2, sampling))

    def rows(self, session: int, base_row: int, *ids: int, logit_rows: int = 1, lease: int = LEASE) -> None:
        self.worker.put(
            RunRows(
                Work(lease, SessionId(session), 0, 1, base_row, ids, None, logit_rows, False, len(ids) > 1)
            )
        )

    def next(self) -> Event:
        return self.events.get(timeout=10)

    def finished(self) -> dict[int, list[int]]:
        event = self.next()
        assert isinstance(event, WorkFinished)
        return {event.work.session: [token.id for token in event.tokens]}


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.stage.gate.set()
    assert bench.worker.stop()
    assert bench.stage.closed or bench.worker.stage.loaded is None


def test_a_session_samples_at_the_rows_it_asks_for(bench: Bench) -> None:
    bench.open(1)
    bench.rows(1, 0, 3, 4, logit_rows=0)
    bench.rows(1, 2, 5)
    assert bench.finished() == {1: []}
    event = bench.next()
    assert isinstance(event, WorkFinished)
    (token,) = event.tokens
    assert (token.position, token.id, token.finish) == (3, 12 % VOCAB, "")


def test_rows_below_those_held_replace_them(bench: Bench) -> None:
    bench.open(1)
    bench.rows(1, 0, 3, 4, 5)
    bench.rows(1, 1, 9)
    assert bench.finished() == {1: [1]}
    assert bench.finished() == {1: [1]}
    assert bench.stage.sessions[SessionId(1)] == [3, 9]


def test_sessions_share_a_batch(bench: Bench) -> None:
    bench.stage.gate.clear()
    for session in (1, 2, 3):
        bench.open(session)
    bench.rows(1, 0, 5)
    assert bench.stage.entered.wait(10)  # the first step is under way: the others queue up behind it
    bench.rows(2, 0, 6)
    bench.rows(3, 0, 7)
    bench.stage.gate.set()
    assert [bench.finished() for _ in range(3)] == [{1: [5]}, {2: [6]}, {3: [7]}]
    assert [len(batch.spans) for batch in bench.stage.batches] == [1, 2]


def test_a_guilty_session_fails_alone(bench: Bench) -> None:
    bench.stage.gate.clear()
    for session in (1, 66, 2):
        bench.open(session)
    bench.rows(1, 0, 1)
    assert bench.stage.entered.wait(10)
    bench.rows(66, 0, 1)
    bench.rows(2, 0, 4)
    bench.stage.gate.set()
    assert bench.finished() == {1: [1]}
    assert bench.next() == SessionBroke(LEASE, SessionId(66), "engine", "session 66 has bad ids")
    assert bench.finished() == {2: [4]}
    assert SessionId(66) not in bench.stage.sessions


def test_a_session_without_room_is_refused(bench: Bench) -> None:
    bench.open(1, max_rows=101)
    assert bench.next() == SessionBroke(LEASE, SessionId(1), "capacity", "no room")


def test_a_bias_outside_the_vocabulary_fails_the_session_and_keeps_no_kv(bench: Bench) -> None:
    sampling = SamplingParams(logit_bias=((VOCAB, 1.0),))
    bench.worker.put(OpenRows(LEASE, SessionId(1), 10, 2, sampling))
    event = bench.next()
    assert isinstance(event, SessionBroke)
    assert event.code == "usage"
    assert not bench.stage.sessions


def test_a_cancelled_session_frees_its_kv_before_the_next_step(bench: Bench) -> None:
    bench.stage.gate.clear()
    bench.open(1)
    bench.open(2)
    bench.rows(1, 0, 1, logit_rows=0)
    assert bench.stage.entered.wait(10)
    bench.rows(1, 1, 1)  # queued, never to run
    bench.worker.put(DropRows(LEASE, SessionId(1)))
    bench.rows(2, 0, 2)
    bench.stage.gate.set()
    assert bench.finished() == {1: []}
    assert bench.finished() == {2: [2]}
    assert SessionId(1) not in bench.stage.sessions
    assert len(bench.stage.batches) == 2


def test_an_engine_crash_breaks_the_stage(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.open(77)
    bench.rows(77, 0, 1)
    event = bench.next()
    assert isinstance(event, StageBroke)
    assert "ZeroDivisionError" in event.reason
    assert bench.stage.closed
    bench.open(1)  # ignored: there is no stage any more
    bench.worker.put(lambda: bench.events.put(StageBroke(0, "", "")))
    assert bench.next() == StageBroke(0, "", "")


def test_commands_of_another_lease_are_not_obeyed(bench: Bench) -> None:
    bench.open(1)
    bench.rows(1, 0, 5, lease=LEASE - 1)
    bench.rows(1, 0, 6)
    assert bench.finished() == {1: [6]}
    assert bench.worker.stage.steps >= 0


NAMES = (b"a" * 16, b"b" * 16, b"c" * 16)


def test_rows_that_are_here_already_are_told_and_counted_by_the_sampler(bench: Bench) -> None:
    bench.stage.pages_here = 2
    bench.worker.put(OpenRows(LEASE, SessionId(1), 99, 90, SamplingParams(temperature=0.0), NAMES))
    assert bench.next() == RowsOpened(LEASE, SessionId(1), 64)
    assert bench.loaded.tails[SessionId(1)]._ids == [n % VOCAB for n in range(64)]
    bench.rows(1, 32, *(n % VOCAB for n in range(32, 70)))  # another stage holds one page only
    event = bench.next()
    assert isinstance(event, WorkFinished)
    (token,) = event.tokens
    assert (token.position, token.id) == (70, sum(n % VOCAB for n in range(70)) % VOCAB)


def test_pages_are_kept_before_the_session_is_dropped(bench: Bench) -> None:
    bench.open(1)
    bench.rows(1, 0, 3, 4)
    bench.finished()
    bench.worker.put(DropRows(LEASE, SessionId(1), 1, NAMES[:1], (7,) * 32))
    bench.worker.put(DropRows(LEASE, SessionId(2), 1, NAMES[:1], (7,) * 32))  # never opened here
    bench.worker.put(lambda: bench.events.put(StageBroke(0, "", "")))
    bench.next()
    assert bench.stage.kept == [(SessionId(1), 1, NAMES[:1], (7,) * 32)]
    assert not bench.stage.sessions


def test_where_rows_depend_on_their_neighbours_nothing_is_taken_over_or_kept(bench: Bench) -> None:
    bench.loaded.queue.shared = False
    bench.stage.pages_here = 2
    bench.worker.put(OpenRows(LEASE, SessionId(1), 99, 90, SamplingParams(temperature=0.0), NAMES))
    assert bench.next() == RowsOpened(LEASE, SessionId(1), 0)
    bench.worker.put(DropRows(LEASE, SessionId(1), 0, NAMES[:1], (7,) * 32))
    bench.worker.put(lambda: bench.events.put(StageBroke(0, "", "")))
    bench.next()
    assert not bench.stage.kept


def test_a_plan_that_ends_keeps_no_pages(bench: Bench) -> None:
    bench.worker.give_back()
    bench.worker.retire()
    bench.worker.put(lambda: bench.events.put(StageBroke(0, "", "")))
    bench.next()
    assert bench.stage.given_back == 2


def test_a_prompt_is_cut_while_others_decode_and_can_be_cancelled_between_its_pieces(bench: Bench) -> None:
    bench.stage.gate.clear()
    bench.open(1)
    bench.open(2, max_rows=90)
    bench.rows(1, 0, 5)
    assert bench.stage.entered.wait(10)
    chunk = (5,) * 60
    prompt = Work(LEASE, SessionId(2), 0, 1, 0, chunk, None, 0, False, is_prompt=True)
    bench.worker.put(RunRows(prompt))
    bench.rows(1, 1, 5)
    bench.stage.gate.set()
    rows = 0
    while rows < 8:
        event = bench.next()
        assert isinstance(event, WorkFinished)
        if event.work.session == 1:
            bench.rows(1, event.work.base_row + 1, 5)
        else:
            assert event.work.base_row == rows
            rows += len(event.work.ids)
    assert rows < 60, "it ran in one piece"
    bench.worker.put(DropRows(LEASE, SessionId(2)))
    bench.worker.put(lambda: bench.events.put(StageBroke(0, "", "")))
    while bench.next() != StageBroke(0, "", ""):
        pass
    assert SessionId(2) not in bench.stage.sessions
    assert not any(work.session == 2 for works in bench.loaded.queue._works.values() for work in works)
