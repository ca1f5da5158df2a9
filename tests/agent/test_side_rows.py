"""Side rows by the rules: what stage 1 issues, what the tail saves, where samples go, what a queue keeps."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.open_rows import pruned, rescued
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    CancelRows,
    Event,
    Instruction,
    Loaded,
    Received,
    RunRows,
    Send,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.engine.side_rows import NO_SIDES, SideRows
from edge_runtime.protocol.messages import (
    Draft,
    Feed,
    Fence,
    FrameRows,
    LoadStage,
    OpenSession,
    SessionFailed,
    Tokens,
)
from tests.support.trees import random_sides

SESSION = SessionId(1)
VOCAB = 50
OPEN = OpenSession(1, 1, 3, 3, 40, (), SamplingParams(temperature=0.0), "sampler")


class Stage:
    """A state machine, and what it wanted done last."""

    def __init__(self, stage: int, stages: int) -> None:
        self.state = PipelineState()
        devices = tuple(f"device-{index}" for index in range(stages))
        self.devices, self.stage = devices, stage
        self.tell(LoadStage(1, "sha256:0", stage, devices, stage, stage, 8))
        self.do(Loaded(1, "class", True, 1, 1000, VOCAB))
        self.tell(OPEN, "" if stage == 0 else devices[stage - 1])

    def do(self, event: Event) -> list[Instruction]:
        self.done = self.state.handle(event)
        return self.done

    def tell(self, message: object, source: str = COORDINATOR, rows: int | None = None) -> list[Work]:
        """The works that follow."""
        hidden = None if rows is None else np.arange(rows, dtype=np.float32)[:, None]
        self.do(Received(source, message, hidden))  # type: ignore[arg-type]
        return [each.work for each in self.done if isinstance(each, RunRows)]

    def frame(
        self, base_row: int, ids: tuple[int, ...], sides: SideRows = NO_SIDES, **changes: int
    ) -> list[Work]:
        parents = (*range(base_row - 1, base_row + len(ids) - 1), *sides.numbered(base_row, len(ids)))
        frame = FrameRows(1, 1, 0, 1, base_row, parents, ids + sides.ids, False)
        return self.tell(replace(frame, **changes), self.devices[self.stage - 1], len(frame.ids))

    def messages(self, kind: type) -> list[object]:
        return [
            each.message for each in self.done if isinstance(each, Send) and isinstance(each.message, kind)
        ]


def tokens(*ids: int, position: int, turn: int = 0) -> Tokens:
    found = tuple(Token(position + index, token) for index, token in enumerate(ids))
    return Tokens(1, 1, turn, found)


@pytest.fixture
def first() -> Stage:
    """Stage 1 of 3, given ids 0, 1, 2 as rows 0 to 2."""
    stage = Stage(0, 3)
    stage.tell(Feed(1, 1, 0, (0, 1, 2)))
    stage.tell(tokens(3, position=3), "device-2")
    return stage


@pytest.fixture
def tail() -> Stage:
    """Stage 3 of 3: ids 0 to 3 are committed, rows 0 to 2 run."""
    stage = Stage(2, 3)
    (work,) = stage.frame(0, (0, 1, 2))
    stage.do(WorkFinished(work, None, (Token(3, 3),)))
    return stage


# ---------------------------------------------------------------- stage 1


def test_side_rows_go_out_with_the_rows_they_stand_beside(first: Stage) -> None:
    (work,) = first.tell(Draft(1, 1, 0, 4, (3, 4, 3, 6), (4, 5, 14, 15)))
    assert (work.base_row, work.ids, work.sides) == (4, (4, 5), SideRows((14, 15), (3, ~0)))
    first.do(WorkFinished(work, np.zeros((4, 1), np.float32)))
    (frame,) = first.messages(FrameRows)
    assert isinstance(frame, FrameRows)
    assert (frame.parents, frame.ids) == ((3, 4, 3, 6), (4, 5, 14, 15))


def test_what_side_rows_gave_is_issued_anew_on_the_chain(first: Stage) -> None:
    first.tell(Draft(1, 1, 0, 4, (3, 4, 3), (4, 5, 14)))
    (work,) = first.tell(tokens(14, 6, position=4), "device-2")
    assert (work.turn, work.base_row, work.ids, work.sides) == (4, 4, (14, 6), NO_SIDES)


def test_a_miss_where_side_rows_gave_ids_starts_from_what_has_come_through(first: Stage) -> None:
    """Row 4 was issued anew and may still wait: a miss at 5 must not lose it."""
    first.tell(Draft(1, 1, 0, 4, (3, 4, 3), (4, 5, 14)))
    (again,) = first.tell(tokens(14, position=4), "device-2")
    assert (again.base_row, again.ids) == (4, (14,))
    first.tell(Draft(1, 1, 4, 5, (4,), (9,)))
    (work,) = first.tell(tokens(6, position=5, turn=4), "device-2")
    assert CancelRows(1, SESSION, 5) in first.done
    assert (work.turn, work.base_row, work.ids) == (5, 4, (14, 6))


def test_without_side_rows_a_miss_starts_at_itself(first: Stage) -> None:
    first.tell(Draft(1, 1, 0, 4, (3, 4), (4, 5)))
    first.tell(tokens(14, position=4), "device-2")
    first.tell(Draft(1, 1, 4, 5, (4,), (9,)))
    (work,) = first.tell(tokens(6, position=5, turn=4), "device-2")
    assert (work.turn, work.base_row, work.ids) == (5, 5, (6,))


# ---------------------------------------------------------------- the tail


def test_side_rows_beside_committed_positions_are_not_run(tail: Stage) -> None:
    (work,) = tail.frame(3, (3, 4), SideRows((13, 14, 15, 16), (2, 3, ~0, 4)), seq=2)
    assert (work.ids, work.logit_rows, work.sides) == ((3, 4), 2, SideRows((14, 16), (3, 4)))
    assert work.hidden is not None
    assert work.hidden[:, 0].tolist() == [0, 1, 3, 5]


def test_a_frame_whose_first_row_is_wrong_is_saved_by_the_row_beside_it(tail: Stage) -> None:
    (work,) = tail.frame(3, (9, 4), SideRows((13, 3, 4, 5), (2, 2, ~1, ~2)), seq=2)
    assert (work.turn, work.base_row, work.ids, work.logit_rows) == (3, 3, (3,), 1)
    assert work.sides == SideRows((4, 5), (3, ~0))
    assert work.hidden is not None
    assert work.hidden[:, 0].tolist() == [3, 4, 5]
    assert [fence.turn for fence in tail.messages(Fence)] == [3]  # type: ignore[attr-defined]
    tail.do(WorkFinished(work, None, (Token(4, 4), Token(5, 5), Token(6, 6))))
    (said, _) = tail.messages(Tokens)
    assert [token.position for token in said.tokens] == [4, 5, 6]  # type: ignore[attr-defined]
    (again,) = tail.frame(3, (3, 4, 5, 6), seq=3, turn=4)
    assert (again.base_row, again.ids, again.logit_rows) == (3, (3, 4, 5, 6), 1)


def test_a_wrong_frame_without_the_right_row_beside_it_is_dead(tail: Stage) -> None:
    assert tail.frame(3, (9, 4), SideRows((13, 3), (2, 3)), seq=2) == []
    assert [fence.turn for fence in tail.messages(Fence)] == [3]  # type: ignore[attr-defined]


def test_work_that_waits_is_saved_when_a_miss_shows(tail: Stage) -> None:
    (work,) = tail.frame(3, (3, 4), seq=2)
    (waits,) = tail.frame(5, (9, 6), SideRows((5, 7), (4, ~0)), seq=3)
    tail.do(WorkFinished(work, None, (Token(4, 4), Token(5, 5))))
    (cancel,) = [each for each in tail.done if isinstance(each, CancelRows)]
    queue = RowQueue(8)
    queue.add(waits)
    queue.cancel(cancel)
    (saved,) = queue.take()
    assert (saved.turn, saved.base_row, saved.ids, saved.sides) == (5, 5, (5,), SideRows((7,), (5,)))
    assert saved.logit_rows == 1


@pytest.mark.parametrize(
    ("parents", "ids"),
    [((2, 2), (3, 4)), ((2, 1), (3, 4)), ((2, 9), (3, 4)), ((1, 3), (3, 4)), ((2, *range(2, 66)), (3,) * 65)],
)
def test_what_is_no_tree_of_few_rows_is_refused(
    tail: Stage, parents: tuple[int, ...], ids: tuple[int, ...]
) -> None:
    """The first is one; it is here to see that it is not refused."""
    frame = FrameRows(1, 1, 0, 2, 3, parents, ids, False)
    tail.tell(frame, "device-1", len(ids))
    is_sound = parents == (2, 2) or parents == tuple(range(2, 67))
    assert bool(tail.messages(SessionFailed)) != is_sound


def test_given_rows_have_none_beside_them() -> None:
    stage = Stage(2, 3)
    stage.frame(0, (0, 1, 2), SideRows((7,), (1,)))
    assert stage.messages(SessionFailed)


# ---------------------------------------------------------------- pure parts


def work_of(base_row: int, ids: tuple[int, ...], sides: SideRows) -> Work:
    hidden = np.array([*ids, *sides.ids], np.float32)[:, None]
    return Work(1, SESSION, 0, 1, base_row, ids, hidden, len(ids), False, False, sides)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_saved_work_is_the_committed_chain_and_what_continued_it(seed: int) -> None:
    rng = random.Random(seed)
    base, count = rng.randint(1, 5), rng.randint(1, 4)
    ids = tuple(rng.randrange(3) for _ in range(count))
    sides = random_sides(rng, base, count, 8, 3, ids)
    start = rng.randint(base, base + count)
    known = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
    work = work_of(base, ids, sides)
    saved = rescued(work, start, known)
    truth = [*ids[: start - base], *known]
    newest = start + len(known) - 1

    def ids_of(index: int) -> list[int]:
        left_at, path = sides.path(index)
        return [*ids[: left_at + 1 - base], *(sides.ids[side] for side in path)]

    paths = [ids_of(index) for index in range(len(sides))]
    chain_is_right = list(ids[: len(truth)]) == truth
    assert (saved is None) == (chain_is_right or truth not in paths)
    if saved is None:
        return
    assert (saved.base_row, list(saved.ids), saved.logit_rows) == (base, truth, 1)
    assert saved.hidden is not None
    assert saved.hidden[:, 0].tolist() == [*saved.ids, *saved.sides.ids]
    below = [
        [*truth, *(saved.sides.ids[side] for side in saved.sides.path(i)[1])] for i in range(len(saved.sides))
    ]
    assert all(saved.sides.path(index)[0] == newest for index in range(len(saved.sides)))
    assert all(path in paths for path in below)


@given(st.integers(0, 2**32))
def test_pruned_work_keeps_what_is_open(seed: int) -> None:
    rng = random.Random(seed)
    base, count = rng.randint(1, 5), rng.randint(1, 4)
    sides = random_sides(rng, base, count, 8, VOCAB)
    newest = rng.randint(0, base + count)
    kept = pruned(work_of(base, tuple(range(count)), sides), newest)
    assert kept.hidden is not None
    assert kept.hidden[:, 0].tolist() == [*range(count), *kept.sides.ids]
    assert len(kept.sides) == sum(sides.path(index)[0] >= newest for index in range(len(sides)))


def test_works_that_follow_each_other_join_side_rows_and_all() -> None:
    queue = RowQueue(8)
    queue.add(work_of(5, (5, 6), SideRows((15, 16), (4, ~0))))
    queue.add(work_of(7, (7,), SideRows((17, 18), (6, ~0))))
    (work,) = queue.take()
    assert (work.ids, work.sides) == ((5, 6, 7), SideRows((15, 16, 17, 18), (4, ~0, 6, ~2)))
    assert work.hidden is not None
    assert work.hidden[:, 0].tolist() == [5, 6, 7, 15, 16, 17, 18]


PARAMS = SamplingParams(
    temperature=0.8, seed=4, repetition_penalty=1.3, frequency_penalty=0.3, top_logprobs=1
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_samples_along_a_tree_are_those_of_one_row_at_a_time(seed: int) -> None:
    """Penalties see the ids of the path; afterwards the sampler is as if nothing had been guessed."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    memory: dict[tuple[int, ...], np.ndarray] = {}

    def logits(ids: list[int]) -> np.ndarray:
        return memory.setdefault(tuple(ids), noise.normal(0, 3, 6).astype(np.float32))

    prompt = [rng.randrange(6) for _ in range(4)]
    plain, ids, expected = TailSession(PARAMS, 6, 4), list(prompt), []
    while len(ids) < 30:
        base = 0 if len(ids) == 4 else len(ids) - 1
        (token,) = plain.sample(base, ids[base:], logits(ids)[None])
        expected.append(token)
        ids.append(token.id)
    tail, got = TailSession(PARAMS, 6, 4), list(prompt)
    found: list[Token] = []
    while len(got) < 30:
        base = 0 if len(got) == 4 else max(4, len(got) - rng.randint(1, 3))
        chain = [
            *got[base:],
            *(rng.choice((ids[len(got)], rng.randrange(6))) for _ in range(rng.randint(0, 2))),
        ]
        sides = random_sides(rng, len(got), base + len(chain) - len(got), 6, 6) if base else NO_SIDES
        wanted = base + len(chain) - len(got) + 1
        prefixes = [[*got[:base], *chain[: index + 1]] for index in range(len(chain) - wanted, len(chain))]
        for index in range(len(sides)):
            left_at, path = sides.path(index)
            prefixes.append([*got[:base], *chain[: left_at + 1 - base], *(sides.ids[side] for side in path)])
        rows = np.stack([logits(prefix) for prefix in prefixes])
        new = tail.sample(base, chain, rows, sides)
        found += new
        got += [token.id for token in new]
    assert found[: len(expected)] == expected[: len(found)]
