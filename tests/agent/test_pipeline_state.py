"""The rules of a stage, one by one, on a bare state object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.agent import session_state
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    ControlLost,
    DropRows,
    Event,
    Ignore,
    Instruction,
    Load,
    Loaded,
    LoadFailed,
    OpenRows,
    Received,
    Retire,
    RunRows,
    Send,
    SessionBroke,
    StageBroke,
    Unload,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.protocol.messages import (
    CloseSession,
    Feed,
    FrameRows,
    Gap,
    Heartbeat,
    LoadStage,
    OpenSession,
    Pooled,
    RowsHeld,
    SessionFailed,
    StageFailed,
    StageReady,
    Tokens,
    UnloadStage,
)

LEASE = 7
ROWS = np.zeros((1, 2), np.float32)
OPEN = OpenSession(1, LEASE, 3, 3, 6, (9,), SamplingParams(), "sampler")
POOL = replace(OPEN, tail="pooler", max_rows=3)


def order(stage: int, stages: int, lease: int = LEASE, chunk: int = 2) -> LoadStage:
    devices = tuple(f"device-{i}" for i in range(stages))
    return LoadStage(lease, "sha256:0", stage, devices, stage, stage, chunk)


def loaded(lease: int = LEASE) -> Loaded:
    return Loaded(lease, "class", True, 10, 100, 50)


def stage_of(stage: int, stages: int) -> PipelineState:
    state = PipelineState()
    assert state.handle(Received(COORDINATOR, order(stage, stages))) == [Load(order(stage, stages))]
    assert messages(state.handle(loaded())) == [(COORDINATOR, StageReady(LEASE, "class", True, 10, 100))]
    return state


def messages(instructions: Sequence[Instruction]) -> list[tuple[str, object]]:
    return [(i.to, i.message) for i in instructions if isinstance(i, Send)]


def works(instructions: Sequence[Instruction]) -> list[Work]:
    return [i.work for i in instructions if isinstance(i, RunRows)]


def ignored(instructions: Sequence[Instruction]) -> bool:
    return all(isinstance(i, Ignore) for i in instructions)


def frame(base_row: int = 0, ids: tuple[int, ...] = (4,), seq: int = 1, **changes: object) -> FrameRows:
    parents = tuple(range(base_row - 1, base_row + len(ids) - 1))
    return replace(FrameRows(1, LEASE, 0, seq, base_row, parents, ids, False), **changes)


def arrives(message: FrameRows, source: str = "device-0") -> Received:
    return Received(source, message, np.zeros((len(message.ids), 2), np.float32))


@pytest.fixture
def tail() -> PipelineState:
    """Stage 2 of 2 with session 1 open."""
    state = stage_of(1, 2)
    assert state.handle(Received("device-0", OPEN)) == [OpenRows(LEASE, SessionId(1), 6, 3, OPEN.sampling)]
    return state


@pytest.fixture
def first() -> PipelineState:
    """Stage 1 of 2 with session 1 open."""
    state = stage_of(0, 2)
    open_rows, forward = state.handle(Received(COORDINATOR, OPEN))
    assert open_rows == OpenRows(LEASE, SessionId(1), 6, 3, None)
    assert messages([forward]) == [("device-1", OPEN)]
    return state


# ---------------------------------------------------------------- plans


def test_a_higher_lease_fences_off_everything_older(tail: PipelineState) -> None:
    assert tail.handle(Received(COORDINATOR, order(0, 1, LEASE + 1))) == [Load(order(0, 1, LEASE + 1))]
    assert not tail.sessions
    late: list[Event] = [
        Received(COORDINATOR, order(1, 2)),
        loaded(),
        LoadFailed(LEASE, "x", "x"),
        StageBroke(LEASE, "x", "x"),
        SessionBroke(LEASE, SessionId(1), "x", "x"),
        Received(COORDINATOR, UnloadStage(LEASE)),
        arrives(frame()),
    ]
    assert all(ignored(tail.handle(event)) for event in late)


def test_a_plan_asked_for_twice_is_answered_twice_and_loaded_once() -> None:
    state = PipelineState()
    state.handle(Received(COORDINATOR, order(0, 1)))
    assert ignored(state.handle(Received(COORDINATOR, order(0, 1))))
    state.handle(loaded())
    again = messages(state.handle(Received(COORDINATOR, order(0, 1))))
    assert again == [(COORDINATOR, StageReady(LEASE, "class", True, 10, 100))]


def test_a_failed_load_is_told_once_with_its_reason_and_again_when_asked() -> None:
    state = PipelineState()
    state.handle(Received(COORDINATOR, order(0, 1)))
    failed = StageFailed(LEASE, "capacity", "too big", "more memory")
    instructions = state.handle(LoadFailed(LEASE, "capacity", "too big", "more memory"))
    assert instructions[0] == Unload(LEASE)
    assert messages(instructions) == [(COORDINATOR, failed)]
    assert ignored(state.handle(StageBroke(LEASE, "engine", "x")))
    assert messages(state.handle(Received(COORDINATOR, order(0, 1)))) == [(COORDINATOR, failed)]
    assert ignored(state.handle(loaded()))


def test_an_unloaded_lease_stays_fenced_off(tail: PipelineState) -> None:
    assert tail.handle(Received(COORDINATOR, UnloadStage(LEASE))) == [Unload(LEASE)]
    assert ignored(tail.handle(Received(COORDINATOR, UnloadStage(LEASE))))
    assert ignored(tail.handle(Received(COORDINATOR, order(1, 2))))
    assert ignored(tail.handle(arrives(frame())))


def test_a_lost_coordinator_ends_the_plan_and_keeps_the_weights(tail: PipelineState) -> None:
    assert tail.handle(ControlLost()) == [Retire(LEASE)]
    assert not tail.sessions
    assert tail.handle(ControlLost()) == []
    assert ignored(tail.handle(arrives(frame())))


@pytest.mark.parametrize("bad", [replace(order(0, 1), stage=1), replace(order(0, 1), prefill_chunk_tokens=0)])
def test_a_plan_that_names_no_such_stage_is_refused(bad: LoadStage) -> None:
    ((_, message),) = messages(PipelineState().handle(Received(COORDINATOR, bad)))
    assert isinstance(message, StageFailed)
    assert message.code == "protocol"


def test_an_engine_that_broke_fails_the_stage(tail: PipelineState) -> None:
    instructions = tail.handle(StageBroke(LEASE, "engine", "boom", "see the log"))
    assert messages(instructions) == [(COORDINATOR, StageFailed(LEASE, "engine", "boom", "see the log"))]
    assert ignored(tail.handle(arrives(frame())))


def test_nobody_but_the_coordinator_gives_plans() -> None:
    assert ignored(PipelineState().handle(Received("device-9", order(0, 1))))


# ---------------------------------------------------------------- who may say what


def test_messages_of_devices_that_may_not_send_them_are_dropped(
    first: PipelineState, tail: PipelineState
) -> None:
    tokens = Tokens(1, LEASE, 0, (Token(3, 5),))
    assert ignored(tail.handle(arrives(frame(), source="device-5")))
    assert ignored(tail.handle(arrives(frame(), source=COORDINATOR)))
    assert ignored(tail.handle(Received(COORDINATOR, replace(OPEN, session=2))))
    assert ignored(tail.handle(Received("device-0", CloseSession(1, LEASE))))
    assert ignored(tail.handle(Received("device-0", Feed(1, LEASE, 0, (1,)))))
    assert ignored(tail.handle(Received("device-1", tokens)))
    assert ignored(first.handle(Received("device-0", tokens)))
    assert ignored(first.handle(Received("device-1", Feed(1, LEASE, 0, (1,)))))
    assert ignored(first.handle(Received(COORDINATOR, Heartbeat(0, 0, 0, 0, 0))))


# ---------------------------------------------------------------- opening and closing


def test_a_session_that_was_closed_before_it_was_opened_stays_closed() -> None:
    state = stage_of(1, 2)
    assert ignored(state.handle(Received(COORDINATOR, CloseSession(1, LEASE))))
    assert ignored(state.handle(Received("device-0", OPEN)))
    assert not state.sessions


def test_closed_sessions_are_remembered_in_a_bounded_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_state, "CLOSED_SESSIONS_KEPT", 2)
    state = stage_of(1, 2)
    for session in (1, 2, 3):
        state.handle(Received(COORDINATOR, CloseSession(session, LEASE)))
    assert ignored(state.handle(Received("device-0", replace(OPEN, session=3))))
    assert not ignored(state.handle(Received("device-0", replace(OPEN, session=1))))


def test_closing_frees_the_rows(tail: PipelineState) -> None:
    assert tail.handle(Received(COORDINATOR, CloseSession(1, LEASE))) == [DropRows(LEASE, SessionId(1))]
    assert ignored(tail.handle(arrives(frame())))


@pytest.mark.parametrize(
    "bad",
    [
        replace(OPEN, forced_rows=0),
        replace(OPEN, forced_rows=6),
        replace(OPEN, forced_rows=9),
        replace(OPEN, prompt_rows=4),
        replace(OPEN, tail="oracle"),
    ],
)
def test_a_session_that_makes_no_sense_is_refused(bad: OpenSession) -> None:
    ((to, message),) = messages(stage_of(1, 2).handle(Received("device-0", bad)))
    assert to == COORDINATOR
    assert isinstance(message, SessionFailed)
    assert message.code == "protocol"


def test_a_session_that_broke_is_dropped_and_told(tail: PipelineState) -> None:
    instructions = tail.handle(SessionBroke(LEASE, SessionId(1), "capacity", "no room"))
    assert instructions[0] == DropRows(LEASE, SessionId(1))
    assert messages(instructions) == [(COORDINATOR, SessionFailed(1, LEASE, "capacity", "no room"))]
    assert ignored(tail.handle(SessionBroke(LEASE, SessionId(1), "capacity", "no room")))


# ---------------------------------------------------------------- stage 1


def test_fed_ids_are_cut_on_a_fixed_grid_whatever_way_they_come(first: PipelineState) -> None:
    assert works(first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1,))))) == []
    chunks = works(first.handle(Received(COORDINATOR, Feed(1, LEASE, 1, (2, 3)))))
    assert [(w.seq, w.base_row, w.ids, w.logit_rows) for w in chunks] == [(1, 0, (1, 2), 0), (2, 2, (3,), 0)]


def test_overlapping_feeds_add_only_what_is_new(first: PipelineState) -> None:
    first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2))))
    assert ignored(first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2)))))
    (chunk,) = works(first.handle(Received(COORDINATOR, Feed(1, LEASE, 1, (2, 3)))))
    assert (chunk.base_row, chunk.ids) == (2, (3,))


def test_a_feed_that_leaves_rows_out_is_a_gap(first: PipelineState) -> None:
    instructions = first.handle(Received(COORDINATOR, Feed(1, LEASE, 1, (2,))))
    assert messages(instructions) == [(COORDINATOR, Gap(1, LEASE, 0))]
    assert ignored(first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1,)))))


@pytest.mark.parametrize("ids", [(1, 2, 3, 4), (1, 50), (-1,)])
def test_ids_that_can_not_be_fed_fail_the_session(first: PipelineState, ids: tuple[int, ...]) -> None:
    ((_, message),) = messages(first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, ids))))
    assert isinstance(message, SessionFailed)
    assert message.code == "protocol"


def test_the_tails_id_becomes_the_next_row_once(first: PipelineState) -> None:
    first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2, 3))))
    tokens = Received("device-1", Tokens(1, LEASE, 0, (Token(3, 5),)))
    (row,) = works(first.handle(tokens))
    assert (row.seq, row.base_row, row.ids) == (3, 3, (5,))
    assert ignored(first.handle(tokens))
    assert ignored(first.handle(Received("device-1", Tokens(1, LEASE, 0, (Token(5, 5),)))))


@pytest.mark.parametrize("last", [Token(3, 9, finish="stop"), Token(3, 5, finish="length")])
def test_the_ring_stops_where_the_tail_says_so(first: PipelineState, last: Token) -> None:
    first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2, 3))))
    assert works(first.handle(Received("device-1", Tokens(1, LEASE, 0, (last,))))) == []
    assert ignored(first.handle(Received("device-1", Tokens(1, LEASE, 0, (Token(3, 5),)))))


def test_tokens_before_the_prompt_is_in_are_dropped(first: PipelineState) -> None:
    first.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2))))
    assert ignored(first.handle(Received("device-1", Tokens(1, LEASE, 0, (Token(2, 5),)))))


# ---------------------------------------------------------------- frames


def test_rows_go_on_with_their_seq_turn_ids_and_parents() -> None:
    state = stage_of(1, 3)
    state.handle(Received("device-0", OPEN))
    sent = frame(0, (4, 5), seq=3, turn=1)
    (work,) = works(state.handle(arrives(sent)))
    rows = np.ones((2, 2), np.float32)
    (send,) = state.handle(WorkFinished(work, rows))
    assert isinstance(send, Send)
    assert (send.to, send.message) == ("device-2", sent)
    assert send.rows is rows


def test_a_frame_is_run_once(tail: PipelineState) -> None:
    assert works(tail.handle(arrives(frame(0, (4, 5), seq=2))))
    assert ignored(tail.handle(arrives(frame(0, (4, 5), seq=2))))
    assert ignored(tail.handle(arrives(frame(2, (4,), seq=1))))
    assert ignored(tail.handle(arrives(frame(0, lease=LEASE - 1, seq=9))))


def test_an_older_turn_is_dropped(tail: PipelineState) -> None:
    assert works(tail.handle(arrives(frame(0, (4,), seq=1, turn=2))))
    assert ignored(tail.handle(arrives(frame(1, (4,), seq=2, turn=1))))


def test_a_frame_that_continues_a_lower_row_replaces_what_followed(tail: PipelineState) -> None:
    tail.handle(arrives(frame(0, (4, 5, 6, 7), seq=1)))
    (work,) = works(tail.handle(arrives(frame(2, (8,), seq=2))))
    assert (work.base_row, tail.sessions[SessionId(1)].rows) == (2, 3)
    (work,) = works(tail.handle(arrives(frame(3, (9,), seq=3))))
    assert work.base_row == 3


def test_a_gap_is_told_once_with_the_row_wanted(tail: PipelineState) -> None:
    tail.handle(arrives(frame(0, (4,), seq=1)))
    assert messages(tail.handle(arrives(frame(2, (5,), seq=3)))) == [(COORDINATOR, Gap(1, LEASE, 1))]
    assert ignored(tail.handle(arrives(frame(1, (5,), seq=4))))


@pytest.mark.parametrize("parents", [(-1, -1), (-1, 5), (0, 1), (-1, 0, 0)])
def test_rows_that_are_no_chain_are_refused_where_rows_are_given(
    tail: PipelineState, parents: tuple[int, ...]
) -> None:
    ((_, message),) = messages(tail.handle(arrives(frame(0, (4, 5), parents=parents))))
    assert isinstance(message, SessionFailed)
    assert message.code == "protocol"


@pytest.mark.parametrize(
    "bad",
    [
        frame(0, ()),
        frame(0, (50,)),
        frame(0, (-1,)),
        frame(-1, (1,)),
        frame(0, (1,) * 7),
        frame(0, (1, 2, 3), bidirectional=True),
    ],
)
def test_a_frame_that_does_not_fit_the_session_fails_it(tail: PipelineState, bad: FrameRows) -> None:
    ((_, message),) = messages(tail.handle(arrives(bad)))
    assert isinstance(message, SessionFailed)
    assert message.code == "protocol"


def test_a_payload_of_the_wrong_size_fails_the_session(tail: PipelineState) -> None:
    ((_, message),) = messages(tail.handle(Received("device-0", frame(), None)))
    assert isinstance(message, SessionFailed)


# ---------------------------------------------------------------- the tail


def test_logits_are_asked_for_from_the_last_given_row_on(tail: PipelineState) -> None:
    counts = [
        works(tail.handle(arrives(frame(base, ids, seq=seq))))[0].logit_rows
        for seq, base, ids in ((1, 0, (1, 2)), (2, 2, (3,)), (3, 3, (4,)))
    ]
    assert counts == [0, 1, 1]
    (redone,) = works(tail.handle(arrives(frame(1, (1, 2, 3), seq=4))))
    assert redone.logit_rows == 2


def test_sampled_ids_go_to_the_coordinator_and_round_the_ring(tail: PipelineState) -> None:
    (work,) = works(tail.handle(arrives(frame(0, (1, 2, 3), turn=4))))
    tokens = Tokens(1, LEASE, 4, (Token(3, 5),))
    assert messages(tail.handle(WorkFinished(work, None, (Token(3, 5),)))) == [
        ("device-0", tokens),
        (COORDINATOR, tokens),
    ]


@pytest.mark.parametrize(
    ("ids", "finish"), [((5,), ""), ((9,), "stop"), ((5, 5, 5), "length"), ((5, 5, 9), "stop")]
)
def test_the_tail_says_when_it_ends(tail: PipelineState, ids: tuple[int, ...], finish: str) -> None:
    (work,) = works(tail.handle(arrives(frame(0, (1, 2, 3)))))
    tokens = tuple(Token(3 + index, token) for index, token in enumerate(ids))
    sent = messages(tail.handle(WorkFinished(work, None, tokens)))
    assert [message.tokens[-1].finish for _, message in sent if isinstance(message, Tokens)] == [finish] * 2


def test_nothing_is_committed_after_the_end(tail: PipelineState) -> None:
    (work,) = works(tail.handle(arrives(frame(0, (1, 2, 3)))))
    sent = messages(tail.handle(WorkFinished(work, None, (Token(3, 9), Token(4, 5)))))
    assert all(len(message.tokens) == 1 for _, message in sent if isinstance(message, Tokens))


def test_rows_of_a_session_that_was_closed_meanwhile_are_dropped(tail: PipelineState) -> None:
    (work,) = works(tail.handle(arrives(frame(0, (1, 2, 3)))))
    tail.handle(Received(COORDINATOR, CloseSession(1, LEASE)))
    assert ignored(tail.handle(WorkFinished(work, None, (Token(3, 5),))))


def test_a_single_stage_turns_by_itself() -> None:
    state = stage_of(0, 1)
    state.handle(Received(COORDINATOR, OPEN))
    *_, last = works(state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2, 3)))))
    assert last.logit_rows == 1
    instructions = state.handle(WorkFinished(last, None, (Token(3, 5),)))
    (row,) = works(instructions)
    assert (row.base_row, row.ids, row.logit_rows) == (3, (5,), 1)
    assert messages(instructions) == [(COORDINATOR, Tokens(1, LEASE, 0, (Token(3, 5),)))]
    assert works(state.handle(WorkFinished(row, None, (Token(4, 9),)))) == []


# ---------------------------------------------------------------- encoders


def test_a_sequence_read_both_ways_is_never_cut() -> None:
    state = stage_of(0, 2)
    state.handle(Received(COORDINATOR, POOL))
    assert works(state.handle(Received(COORDINATOR, Feed(1, LEASE, 0, (1, 2))))) == []
    (work,) = works(state.handle(Received(COORDINATOR, Feed(1, LEASE, 2, (3,)))))
    assert (work.ids, work.bidirectional) == ((1, 2, 3), True)
    ((to, message),) = messages(state.handle(WorkFinished(work, np.zeros((3, 2), np.float32))))
    assert to == "device-1"
    assert isinstance(message, FrameRows)
    assert message.bidirectional


def test_a_pooling_tail_answers_with_its_vector() -> None:
    state = stage_of(1, 2)
    state.handle(Received("device-0", POOL))
    (work,) = works(state.handle(arrives(frame(0, (1, 2, 3), bidirectional=True))))
    assert work.logit_rows == 0
    vector = np.ones(2, np.float32)
    send, through = state.handle(WorkFinished(work, vector))
    assert isinstance(send, Send)
    assert (send.to, send.message) == (COORDINATOR, Pooled(1, LEASE))
    assert send.rows is vector
    assert messages([through]) == [("device-0", RowsHeld(1, LEASE, 3, reused=False))]


def test_a_part_of_such_a_sequence_is_refused() -> None:
    state = stage_of(1, 2)
    state.handle(Received("device-0", POOL))
    ((_, message),) = messages(state.handle(arrives(frame(0, (1, 2), bidirectional=True))))
    assert isinstance(message, SessionFailed)
