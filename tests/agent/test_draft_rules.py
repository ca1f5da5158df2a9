"""What becomes of a draft, rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.continuation import Continuation
from edge_runtime.agent.draft_rules import MAX_FRAME_ROWS, MAX_ROWS_AHEAD, in_frames, merge, rows_ahead
from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS
from edge_runtime.protocol.messages import Draft

GIVEN = 10


def chain(committed: int, issued: int) -> Continuation:
    """Ids equal positions; rows up to position GIVEN + issued - 1, ids known up to GIVEN + committed - 1."""
    result = Continuation(GIVEN)
    for position in range(GIVEN, GIVEN + committed):
        result.commit(position)
    result.issue(GIVEN, range(GIVEN, GIVEN + issued))
    return result


def draft(base_row: int, *ids: int, turn: int = 0) -> Draft:
    return Draft(1, 1, turn, base_row, tuple(range(base_row - 1, base_row + len(ids) - 1)), ids)


def issued(guess: Draft, turn: int = 0, max_rows: int = 100, ahead: int = 99) -> tuple[tuple[int, ...], int]:
    """With positions 10 to 12 committed and rows 10 to 14 issued: (what is issued from row 15 on, turn of drafts)"""
    merged = merge(chain(3, 5), 15, max_rows, turn, ahead, guess)
    assert bool(merged.ids) == (merged.reason == "")
    return merged.ids, merged.turn


def test_what_goes_beyond_the_rows_issued_is_new() -> None:
    assert issued(draft(15, 7, 8)) == ((7, 8), 0)
    assert issued(draft(13, 13, 14, 7)) == ((7,), 0)
    assert issued(draft(11, 11, 12, 13, 14, 7, 8)) == ((7, 8), 0)
    assert issued(draft(11, 11, 12)) == ((), 0)


def test_a_draft_before_which_one_was_lost_or_for_given_rows_is_dropped() -> None:
    assert issued(draft(16, 7)) == ((), 0)
    assert issued(draft(9, 9, 10)) == ((), 0)
    assert merge(chain(0, 0), 9, 100, 0, 99, draft(9, 7)).ids == ()


def test_another_id_at_a_committed_position_ends_all_drafts_that_do_not_know_it() -> None:
    assert issued(draft(11, 11, 99, 13)) == ((), 12)
    assert issued(draft(15, 7, turn=11), turn=12) == ((), 12)
    assert issued(draft(15, 7, turn=12), turn=12) == ((7,), 12)


def test_another_guess_for_a_position_that_is_open_is_dropped() -> None:
    assert issued(draft(13, 13, 99, 7)) == ((), 0)


def test_a_turn_that_the_drafter_knows_first_is_believed() -> None:
    assert issued(draft(15, 7, turn=13)) == ((7,), 13)
    assert issued(draft(15, 7, turn=101)) == ((), 0)


def test_side_rows_and_what_follows_them_are_left_out() -> None:
    assert issued(Draft(1, 1, 0, 15, (14, 15, 14, 17), (1, 2, 3, 4))) == ((1, 2), 0)
    assert issued(Draft(1, 1, 0, 15, (13,), (1,))) == ((), 0)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(14, 60), st.integers(0, 30))
def test_rows_stay_within_the_request_and_the_window(
    count: int, base: int, max_rows: int, ahead: int
) -> None:
    ids, _ = issued(draft(base, *range(base, base + count)), max_rows=max_rows, ahead=ahead)
    assert not ids or 15 + len(ids) <= min(max_rows - 1, 13 + ahead)
    assert [*ids] == [*range(15, 15 + len(ids))]


@given(st.integers(0, 200))
def test_long_drafts_go_in_frames(count: int) -> None:
    frames = in_frames(tuple(range(count)))
    assert [token for ids in frames for token in ids] == [*range(count)]
    assert all(0 < len(ids) <= MAX_FRAME_ROWS for ids in frames)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_the_more_sessions_run_the_less_is_guessed(stages: int) -> None:
    rooms = [rows_ahead(sessions, stages) for sessions in range(1, 200)]
    assert rooms[0] == MAX_ROWS_AHEAD
    assert rooms == sorted(rooms, reverse=True)
    assert all(room == 0 for room in rooms[MAX_DECODE_ROWS // 2 :])
    assert rooms[3] >= 15 * stages
