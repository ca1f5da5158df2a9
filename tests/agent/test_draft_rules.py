"""What becomes of a draft, rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.continuation import Continuation
from edge_runtime.agent.draft_rules import (
    MAX_FRAME_ROWS,
    MAX_ROWS_AHEAD,
    MAX_SIDE_ROWS,
    Merged,
    in_frames,
    merge,
    rows_ahead,
)
from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS
from edge_runtime.engine.side_rows import SideRows
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


def sides(guess: Draft, max_rows: int = 100, ahead: int = MAX_ROWS_AHEAD) -> SideRows:
    return merge(chain(3, 5), 15, max_rows, 0, ahead, guess).sides


def test_side_rows_go_beside_the_rows_that_are_issued_with_them() -> None:
    tree = Draft(1, 1, 0, 15, (14, 15, 14, 17, 16), (1, 2, 3, 4, 5))
    assert issued(tree) == ((1, 2), 0)
    assert sides(tree) == SideRows((3, 4, 5), (14, ~0, 16))
    assert issued(Draft(1, 1, 0, 15, (13,), (1,))) == ((), 0)


def test_side_rows_beside_what_is_issued_already_are_left_out() -> None:
    tree = Draft(1, 1, 0, 13, (12, 13, 14, 12, 16, 13, 14), (13, 14, 7, 1, 2, 3, 4))
    assert issued(tree) == ((7,), 0)
    assert sides(tree) == SideRows((4,), (14,))
    nothing_new = Draft(1, 1, 0, 13, (12, 13, 13), (13, 14, 1))
    assert (issued(nothing_new), sides(nothing_new)) == (((), 0), SideRows())


def test_side_rows_end_where_the_request_does_and_are_only_for_a_session_alone() -> None:
    tree = Draft(1, 1, 0, 15, (14, 15, 14, 17, 18), (1, 2, 3, 4, 5))
    assert sides(tree, max_rows=18) == SideRows((3, 4), (14, ~0))
    assert sides(tree, ahead=MAX_ROWS_AHEAD - 1) == SideRows()


def test_a_draft_whose_parents_make_no_tree_is_its_chain() -> None:
    for parents in ((14, 15, 13), (14, 15, 18)):
        junk = Draft(1, 1, 0, 15, parents, (1, 2, 3))
        assert (issued(junk), sides(junk)) == (((1, 2), 0), SideRows())


def test_side_rows_share_the_frame_of_the_row_they_stand_beside() -> None:
    ids = tuple(range(2 * MAX_FRAME_ROWS))
    last = 99 + len(ids)
    beside = SideRows((1, 2, 3, 4, 5), (99, 99 + MAX_FRAME_ROWS, ~1, last, ~3))
    first, second = in_frames(100, Merged(ids, 0, sides=beside))
    assert first == (ids[:MAX_FRAME_ROWS], SideRows((1,), (99,)))
    assert second == (ids[MAX_FRAME_ROWS:], SideRows((2, 3, 4, 5), (99 + MAX_FRAME_ROWS, ~0, last, ~2)))
    many = SideRows((7,) * 40, (99,) * 40)
    ((_, kept),) = in_frames(100, Merged((1,), 0, sides=many))
    assert len(kept) == MAX_SIDE_ROWS


@given(st.integers(0, 30), st.integers(0, 40), st.integers(14, 60), st.integers(0, 30))
def test_rows_stay_within_the_request_and_the_window(
    count: int, base: int, max_rows: int, ahead: int
) -> None:
    ids, _ = issued(draft(base, *range(base, base + count)), max_rows=max_rows, ahead=ahead)
    assert not ids or 15 + len(ids) <= min(max_rows - 1, 13 + ahead)
    assert [*ids] == [*range(15, 15 + len(ids))]


@given(st.integers(0, 200))
def test_long_drafts_go_in_frames(count: int) -> None:
    frames = in_frames(50, Merged(tuple(range(count)), 0))
    assert [token for ids, _ in frames for token in ids] == [*range(count)]
    assert all(0 < len(ids) <= MAX_FRAME_ROWS and not beside for ids, beside in frames)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_the_more_sessions_run_the_less_is_guessed(stages: int) -> None:
    rooms = [rows_ahead(sessions, stages) for sessions in range(1, 200)]
    assert rooms[0] == MAX_ROWS_AHEAD
    assert rooms == sorted(rooms, reverse=True)
    assert all(room == 0 for room in rooms[MAX_DECODE_ROWS // 2 :])
    assert rooms[3] >= 15 * stages
