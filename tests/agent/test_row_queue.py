"""Who runs next."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS, TURN_ROWS, CancelRows, Work
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.core import SessionId


def work(session: int, rows: int, seq: int = 1) -> Work:
    return Work(1, SessionId(session), 0, seq, 0, tuple(range(rows)), None, 0, False, is_prompt=rows > 1)


def taken(queue: RowQueue) -> list[int]:
    return [work.session for work in queue.take()]


def test_decode_rows_come_first_and_a_chunk_rides_along() -> None:
    queue = RowQueue(8)
    for session, rows in ((1, 8), (2, 1), (3, 8), (4, 1)):
        queue.add(work(session, rows))
    assert taken(queue) == [2, 4, 1]
    assert taken(queue) == [3]
    assert taken(queue) == []


def test_many_decoding_sessions_do_not_keep_a_prompt_waiting() -> None:
    queue = RowQueue(8)
    for session in range(1, 201):
        queue.add(work(session, 1))
    queue.add(work(500, 8))
    assert 500 in taken(queue)


def test_prompts_take_turns_of_many_rows() -> None:
    queue, rows = RowQueue(TURN_ROWS // 4), TURN_ROWS // 4
    for seq in range(10):
        queue.add(work(1, rows, seq))
    for seq in range(5):
        queue.add(work(2, rows, seq))
    assert [taken(queue)[0] for _ in range(15)] == [1] * 4 + [2] * 4 + [1] * 4 + [2] + [1] * 2


def test_whoever_comes_back_begins_a_new_turn() -> None:
    queue, rows = RowQueue(TURN_ROWS), TURN_ROWS * 3 // 4
    for _ in range(2):
        queue.add(work(1, rows))
        assert taken(queue) == [1]
    queue.add(work(1, rows, 1))
    queue.add(work(1, rows, 2))
    queue.add(work(2, rows))
    assert [taken(queue) for _ in range(3)] == [[1], [1], [2]]


def test_a_chunk_larger_than_the_budget_still_runs() -> None:
    queue = RowQueue(4)
    queue.add(work(1, 100))
    assert taken(queue) == [1]


def rows_taken(queue: RowQueue, prompt_rows: int) -> list[tuple[int, int, int]]:
    """(session, first row, rows)"""
    return [(work.session, work.base_row, len(work.ids)) for work in queue.take(prompt_rows)]


def test_chunks_are_cut_where_few_prompt_rows_may_ride() -> None:
    queue = RowQueue(16)
    queue.add(work(1, 10))
    queue.add(work(2, 1))
    queue.add(work(3, 10))
    assert rows_taken(queue, 4) == [(2, 0, 1), (1, 0, 4)]
    queue.add(work(2, 1))
    assert rows_taken(queue, 0) == [(2, 0, 1)]
    assert rows_taken(queue, 8) == [(1, 4, 6), (3, 0, 2)]
    assert rows_taken(queue, 99) == [(3, 2, 8)]
    assert not queue


def test_a_prompt_whose_chunk_was_cut_stays_first_until_the_chunk_is_done() -> None:
    queue = RowQueue(16)
    for session in (1, 2):
        queue.add(work(session, 6, 1))
        queue.add(work(session, 6, 2))
    taken_rows = [rows_taken(queue, 4) for _ in range(6)]
    assert taken_rows == [
        [(1, 0, 4)],
        [(1, 4, 2), (2, 0, 2)],
        [(1, 0, 4)],
        [(1, 4, 2), (2, 2, 2)],
        [(2, 4, 2)],
        [(2, 0, 4)],
    ]


def test_pieces_of_a_frame_have_its_seq_its_rows_and_its_logits_at_the_end() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole = Work(1, SessionId(1), 3, 7, 20, tuple(range(6)), hidden, 1, False, True)
    queue = RowQueue(16)
    queue.add(whole)
    pieces = [queue.take(4)[0] for _ in range(2)]
    assert [(piece.turn, piece.seq, piece.base_row, piece.ids) for piece in pieces] == [
        (3, 7, 20, (0, 1, 2, 3)),
        (3, 7, 24, (4, 5)),
    ]
    assert [piece.logit_rows for piece in pieces] == [0, 1]
    assert np.array_equal(np.concatenate([piece.hidden for piece in pieces]), hidden)


def test_what_must_run_in_one_step_is_never_cut() -> None:
    verify = Work(1, SessionId(1), 0, 1, 0, (1, 2, 3), None, 3, False)
    encoder = Work(1, SessionId(2), 0, 1, 0, (1, 2, 3), None, 0, True)
    for each in (verify, encoder):
        queue = RowQueue(16)
        queue.add(each)
        assert queue.take(1) == [each]


def test_without_sharing_every_work_has_its_own_step() -> None:
    queue = RowQueue(8, shared=False)
    for session in (1, 2):
        queue.add(work(session, 1))
    assert [taken(queue) for _ in range(3)] == [[1], [2], []]


def test_a_dropped_session_is_gone() -> None:
    queue = RowQueue(8)
    queue.add(work(1, 1))
    queue.drop(SessionId(1))
    assert taken(queue) == []
    assert len(queue) == 0


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 9)), max_size=200),
    st.booleans(),
    st.sampled_from([None, 1, 3, 50]),
)
def test_everything_runs_once_and_in_order(
    items: list[tuple[int, int]], shared: bool, prompt_rows: int | None
) -> None:
    queue = RowQueue(8, shared=shared)
    for seq, (session, rows) in enumerate(items):
        queue.add(work(session, rows, seq))
    ran: dict[int, list[tuple[int, int]]] = {}
    rows = 0
    while len(queue):
        step = queue.take(prompt_rows)
        if shared and prompt_rows is not None:
            assert sum(len(w.ids) for w in step if not w.is_decode) <= prompt_rows
        assert step, "work is left, yet nothing was taken"
        assert len({w.session for w in step}) == len(step)
        assert sum(w.is_decode for w in step) <= MAX_DECODE_ROWS
        for w in step:
            ran.setdefault(w.session, []).append((w.seq, w.base_row))
            rows += len(w.ids)
    assert all(works == sorted(set(works)) for works in ran.values())
    assert rows == sum(count for _, count in items)


def guesses(session: int, base_row: int, rows: int, turn: int = 0) -> Work:
    ids = tuple(range(base_row, base_row + rows))
    hidden = np.arange(base_row, base_row + rows, dtype=np.float32)[:, None]
    return Work(1, SessionId(session), turn, base_row, base_row, ids, hidden, 0, False)


def test_guesses_that_follow_each_other_run_as_one() -> None:
    queue = RowQueue(8)
    for base_row, rows in ((5, 1), (6, 3), (9, 2), (12, 1)):
        queue.add(guesses(1, base_row, rows))
    assert queue.decode_rows == 6
    (first,) = queue.take()
    assert (first.base_row, first.ids, first.seq) == (5, (5, 6, 7, 8, 9, 10), 9)
    assert first.hidden is not None
    assert first.hidden[:, 0].tolist() == [5, 6, 7, 8, 9, 10]
    assert [work.base_row for work in queue.take()] == [12]


def test_guesses_of_many_sessions_share_a_step() -> None:
    queue = RowQueue(8)
    for session in (1, 2, 3):
        queue.add(guesses(session, 5, 30))
    assert taken(queue) == [1, 2]
    assert taken(queue) == [3]


def test_work_of_older_turns_is_cancelled_and_nothing_else() -> None:
    queue = RowQueue(8)
    for session, base_row, turn in ((1, 5, 0), (1, 6, 6), (2, 9, 0)):
        queue.add(guesses(session, base_row, 1, turn))
    queue.cancel(CancelRows(1, SessionId(1), 6))
    queue.cancel(CancelRows(1, SessionId(3), 6))
    assert [(work.session, work.turn) for work in queue.take()] == [(1, 6), (2, 0)]
    queue.add(guesses(1, 5, 1))
    queue.cancel(CancelRows(1, SessionId(1), 9))
    assert not queue
