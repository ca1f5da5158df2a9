"""The rules of a stage for rows, one by one: ids fed, frames, what the tail samples, encoders."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.agent.pipeline_events import COORDINATOR, Received, Send, WorkFinished
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.core import SessionId, Token
from edge_runtime.protocol.messages import (
    CloseSession,
    Feed,
    FrameRows,
    Gap,
    Pooled,
    RowsHeld,
    SessionFailed,
    Tokens,
)
from tests.support.bare_stage import LEASE, OPEN, POOL, arrives, frame, ignored, messages, stage_of, works


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
