"""Prompts over a pipeline, one event at a time: what is reused, what is sent ahead, what the coordinator hears."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    TURN_ROWS,
    DropRows,
    Ignore,
    Instruction,
    Loaded,
    OpenRows,
    Received,
    RowsOpened,
    RunRows,
    Send,
    WorkFinished,
)
from edge_runtime.agent.pipeline_rules import PROGRESS_ROWS
from edge_runtime.agent.pipeline_state import CHUNKS_UNDER_WAY, PipelineState
from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.protocol.messages import (
    NOBODY_ASKS,
    CloseSession,
    Feed,
    FrameRows,
    LoadStage,
    Message,
    OpenSession,
    RowsHeld,
    SessionFailed,
    Tokens,
)

LEASE, CHUNK = 7, 16
NAMES = tuple(bytes([n]) * 16 for n in range(3))
IDS = tuple(range(10, 110))
OPEN = OpenSession(1, LEASE, 100, 100, 120, (9,), SamplingParams(), "sampler", b"".join(NAMES), 96)


def stage_of(stage: int, stages: int) -> PipelineState:
    state = PipelineState()
    devices = tuple(f"device-{i}" for i in range(stages))
    state.handle(Received(COORDINATOR, LoadStage(LEASE, "sha256:0", stage, devices, stage, stage, CHUNK)))
    state.handle(Loaded(LEASE, "class", True, 10, 1000, 200))
    return state


def sent(instructions: list[Instruction]) -> list[tuple[str, Message]]:
    return [(each.to, each.message) for each in instructions if isinstance(each, Send)]


def rows_run(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """(first row, rows) of works"""
    return [(each.work.base_row, len(each.work.ids)) for each in instructions if isinstance(each, RunRows)]


def held(rows: int, *, reused: bool = False, session: int = 1) -> Received:
    return Received("device-1", RowsHeld(session, LEASE, rows, reused))


def opened(
    state: PipelineState, rows: int, order: OpenSession = OPEN, source: str = COORDINATOR
) -> list[Instruction]:
    """The session is opened, and the compute thread has found `rows` rows of it."""
    (open_rows,) = state.handle(Received(source, order))
    assert isinstance(open_rows, OpenRows)
    assert open_rows.page_names == NAMES
    return state.handle(RowsOpened(LEASE, SessionId(1), rows))


# ---------------------------------------------------------------- what is reused


def test_stage_1_waits_for_what_all_stages_hold_and_begins_there() -> None:
    state = stage_of(0, 2)
    assert sent(opened(state, 96)) == [("device-1", OPEN)]
    assert not rows_run(state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, IDS))))
    assert rows_run(state.handle(held(64, reused=True))) == [(64, 16), (80, 16), (96, 4)]


def test_what_all_stages_hold_may_come_before_the_ids() -> None:
    state = stage_of(0, 2)
    opened(state, 96)
    assert not rows_run(state.handle(held(64, reused=True)))
    assert not rows_run(state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, IDS[:70]))))
    assert rows_run(state.handle(Received(COORDINATOR, Feed(1, LEASE, 70, IDS[70:90])))) == [(64, 16)]


def test_where_stage_1_holds_nothing_nobody_waits() -> None:
    state = stage_of(0, 2)
    state.handle(Received(COORDINATOR, OPEN))
    assert not state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, IDS[:16])))
    done = state.handle(RowsOpened(LEASE, SessionId(1), 0))
    assert sent(done) == [("device-1", replace(OPEN, held_rows=NOBODY_ASKS))]
    assert rows_run(done) == [(0, 16)]


def test_a_stage_in_the_middle_passes_on_what_it_and_those_before_it_hold() -> None:
    for own, passed_on in ((96, 64), (32, 32), (0, 0)):
        state = stage_of(1, 3)
        done = opened(state, own, replace(OPEN, held_rows=64), "device-0")
        assert sent(done) == [("device-2", replace(OPEN, held_rows=passed_on))]


def test_where_nobody_asks_orders_go_on_at_once() -> None:
    state = stage_of(1, 3)
    order = replace(OPEN, held_rows=NOBODY_ASKS)
    assert sent(state.handle(Received("device-0", order))) == [("device-2", order)]
    assert not sent(state.handle(RowsOpened(LEASE, SessionId(1), 96)))


@pytest.mark.parametrize("own", [96, 32, 0])
def test_the_tail_answers_in_any_case_and_takes_rows_from_there_on(own: int) -> None:
    state = stage_of(1, 2)
    done = opened(state, own, replace(OPEN, held_rows=64), "device-0")
    answer = RowsHeld(1, LEASE, min(own, 64), reused=True)
    assert sent(done) == [("device-0", answer), (COORDINATOR, answer)]
    frame = FrameRows(1, LEASE, 0, 1, answer.rows, (answer.rows - 1,), (5,), False)
    assert rows_run(state.handle(Received("device-0", frame, np.zeros((1, 2), np.float32)))) == [
        (answer.rows, 1)
    ]


def test_a_single_stage_begins_at_once_and_tells_the_coordinator() -> None:
    state = stage_of(0, 1)
    state.handle(Received(COORDINATOR, OPEN))
    state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, IDS)))
    done = state.handle(RowsOpened(LEASE, SessionId(1), 96))
    assert sent(done) == [(COORDINATOR, RowsHeld(1, LEASE, 96, reused=True))]
    assert rows_run(done) == [(96, 4)]


def test_a_tail_that_claims_more_than_stage_1_holds_is_not_believed() -> None:
    state = stage_of(0, 2)
    opened(state, 32)
    state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, IDS)))
    assert rows_run(state.handle(held(96, reused=True)))[0] == (32, 16)
    ((_, failed),) = sent(state.handle(held(101)))
    assert isinstance(failed, SessionFailed)


@pytest.mark.parametrize(
    "bad",
    [
        replace(OPEN, page_names=b"x" * 15),
        replace(OPEN, page_names=b"x" * 16 * 4),  # nothing would be left to run
        replace(OPEN, held_rows=97),
        replace(OPEN, held_rows=128),
        replace(OPEN, held_rows=-2),
        replace(OPEN, tail="pooler", max_rows=100),
    ],
)
def test_names_that_make_no_sense_are_refused(bad: OpenSession) -> None:
    ((_, failed),) = sent(stage_of(0, 2).handle(Received(COORDINATOR, bad)))
    assert isinstance(failed, SessionFailed)
    assert failed.code == "protocol"


def test_pages_of_the_answer_are_kept_after_those_of_the_prompt() -> None:
    state = stage_of(0, 2)
    opened(state, 0)
    close = CloseSession(1, LEASE, b"y" * 16, IDS[:32])
    assert state.handle(Received(COORDINATOR, close)) == [
        DropRows(LEASE, SessionId(1), 3, (b"y" * 16,), IDS[:32])
    ]


def test_names_without_their_ids_keep_nothing() -> None:
    state = stage_of(0, 2)
    opened(state, 0)
    close = CloseSession(1, LEASE, b"y" * 32, IDS[:32])
    assert state.handle(Received(COORDINATOR, close)) == [DropRows(LEASE, SessionId(1))]


# ---------------------------------------------------------------- how far ahead

LONG = replace(OPEN, forced_rows=180, prompt_rows=180, max_rows=190, page_names=b"", held_rows=NOBODY_ASKS)
LONG_IDS = tuple(n % 200 for n in range(180))
WINDOW = CHUNKS_UNDER_WAY * 2 * CHUNK


def test_stage_1_runs_no_more_than_a_window_ahead_of_the_tail() -> None:
    state = stage_of(0, 2)
    state.handle(Received(COORDINATOR, LONG))
    ahead = rows_run(state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, LONG_IDS))))
    assert sum(rows for _, rows in ahead) == WINDOW
    assert not rows_run(state.handle(held(0)))
    assert rows_run(state.handle(held(16))) == [(WINDOW, 16)]
    assert not rows_run(state.handle(held(16)))
    assert rows_run(state.handle(held(20))) == [(WINDOW + 16, 16)]  # a piece: the last chunk may reach out
    assert not rows_run(state.handle(held(32)))
    assert rows_run(state.handle(held(64))) == [(WINDOW + 32, 16), (WINDOW + 48, 16)]


def fed_with(state: PipelineState, session: int, rows: int) -> list[Instruction]:
    order = replace(LONG, session=session, forced_rows=rows, prompt_rows=rows, max_rows=rows + 8)
    state.handle(Received(COORDINATOR, order))
    return state.handle(Received(COORDINATOR, Feed(session, LEASE, 0, tuple(n % 200 for n in range(rows)))))


def until_all_is_through(state: PipelineState, instructions: list[Instruction]) -> list[int]:
    """Sessions in the order in which their chunks are issued, while the tail takes one after the other."""
    works = [each.work for each in instructions if isinstance(each, RunRows)]
    for work in works:
        done = held(work.base_row + len(work.ids), session=work.session)
        works += [each.work for each in state.handle(done) if isinstance(each, RunRows)]
    return [work.session for work in works]


def test_the_window_is_one_for_all_and_prompts_go_through_it_as_they_came() -> None:
    state = stage_of(0, 2)
    works = [each for session in (1, 2) for each in fed_with(state, session, 80)]
    assert sum(rows for _, rows in rows_run(works)) == WINDOW
    assert until_all_is_through(state, works) == [1] * 5 + [2] * 5


def test_a_long_prompt_lets_others_have_a_turn() -> None:
    state = stage_of(0, 2)
    turn, long, short = TURN_ROWS // CHUNK, 3 * TURN_ROWS, CHUNK
    works = [
        each
        for session, rows in ((1, long), (2, short), (3, short))
        for each in fed_with(state, session, rows)
    ]
    assert until_all_is_through(state, works) == [1] * turn + [2, 3] + [1] * 2 * turn


def test_a_closed_session_makes_room_for_others() -> None:
    state = stage_of(0, 2)
    for session in (1, 2):
        state.handle(Received(COORDINATOR, replace(LONG, session=session)))
        state.handle(Received(COORDINATOR, Feed(session, LEASE, 0, LONG_IDS)))
    done = state.handle(Received(COORDINATOR, CloseSession(1, LEASE)))
    assert rows_run(done) == [(0, 16), (16, 16), (32, 16), (48, 16)]


def test_the_first_token_says_that_all_rows_came_through() -> None:
    state = stage_of(0, 2)
    short = replace(LONG, forced_rows=WINDOW, prompt_rows=WINDOW)
    for session, order in ((1, short), (2, LONG)):
        state.handle(Received(COORDINATOR, replace(order, session=session)))
        state.handle(Received(COORDINATOR, Feed(session, LEASE, 0, LONG_IDS[: order.forced_rows])))
    tokens = Tokens(1, LEASE, 0, (Token(WINDOW, 5),))
    assert rows_run(state.handle(Received("device-1", tokens)))[1:] == [(0, 16), (16, 16), (32, 16), (48, 16)]


def test_the_tail_says_what_came_through_and_now_and_then_to_the_coordinator() -> None:
    state = stage_of(1, 2)
    order = replace(LONG, forced_rows=600, prompt_rows=600, max_rows=610)
    state.handle(Received("device-0", order))
    told: list[tuple[str, Message]] = []
    for seq, base in enumerate(range(0, 512, 64), start=1):
        frame = FrameRows(1, LEASE, 0, seq, base, tuple(range(base - 1, base + 63)), tuple(range(64)), False)
        (run,) = state.handle(Received("device-0", frame, np.zeros((64, 2), np.float32)))
        assert isinstance(run, RunRows)
        told += sent(state.handle(WorkFinished(run.work)))
    assert [m.rows for to, m in told if to == "device-0" and isinstance(m, RowsHeld)] == list(
        range(64, 513, 64)
    )
    assert [m.rows for to, m in told if to == COORDINATOR and isinstance(m, RowsHeld)] == [
        PROGRESS_ROWS,
        2 * PROGRESS_ROWS,
    ]


# ---------------------------------------------------------------- pieces


def test_pieces_of_a_frame_are_run_once_and_in_order() -> None:
    state = stage_of(1, 2)
    state.handle(Received("device-0", LONG))

    def arrives(seq: int, base: int, count: int) -> list[Instruction]:
        parents, ids = tuple(range(base - 1, base + count - 1)), tuple(range(count))
        frame = FrameRows(1, LEASE, 0, seq, base, parents, ids, False)
        return state.handle(Received("device-0", frame, np.zeros((count, 2), np.float32)))

    assert rows_run(arrives(1, 0, 5)) == [(0, 5)]
    assert rows_run(arrives(1, 5, 3)) == [(5, 3)]
    for late in ((1, 0, 5), (1, 5, 3), (0, 8, 1)):
        assert all(isinstance(each, Ignore) for each in arrives(*late))
    assert rows_run(arrives(2, 8, 4)) == [(8, 4)]
    assert all(isinstance(each, Ignore) for each in arrives(1, 12, 1))
    ((to, gap),) = sent(arrives(2, 14, 1))  # a piece was lost
    assert (to, getattr(gap, "wanted_row", None)) == (COORDINATOR, 12)
