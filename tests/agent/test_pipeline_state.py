"""The rules of a stage for plans and sessions, one by one, on a bare state object."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_runtime.agent import session_state
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    ControlLost,
    DropRows,
    Event,
    Load,
    LoadFailed,
    Received,
    Retire,
    SessionBroke,
    StageBroke,
    Unload,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.core import SessionId, Token
from edge_runtime.protocol.messages import (
    CloseSession,
    Feed,
    Heartbeat,
    LoadStage,
    OpenSession,
    SessionFailed,
    StageFailed,
    StageReady,
    Tokens,
    UnloadStage,
)
from tests.support.bare_stage import LEASE, OPEN, arrives, frame, ignored, loaded, messages, order, stage_of

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
