"""Who runs next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import Work
from edge_runtime.agent.row_queue import MAX_DECODE_ROWS, RowQueue
from edge_runtime.core import SessionId


def work(session: int, rows: int, seq: int = 1) -> Work:
    return Work(1, SessionId(session), 0, seq, 0, tuple(range(rows)), None, 0, False)


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


def test_prompts_take_turns() -> None:
    queue = RowQueue(4)
    for seq in range(3):
        queue.add(work(1, 4, seq))
    queue.add(work(2, 4))
    assert [taken(queue) for _ in range(4)] == [[1], [2], [1], [1]]


def test_a_chunk_larger_than_the_budget_still_runs() -> None:
    queue = RowQueue(4)
    queue.add(work(1, 100))
    assert taken(queue) == [1]


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


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 9)), max_size=200), st.booleans())
def test_everything_runs_once_and_in_order(items: list[tuple[int, int]], shared: bool) -> None:
    queue = RowQueue(8, shared=shared)
    for seq, (session, rows) in enumerate(items):
        queue.add(work(session, rows, seq))
    ran: dict[int, list[int]] = {}
    while len(queue):
        step = queue.take()
        assert step, "work is left, yet nothing was taken"
        assert len({w.session for w in step}) == len(step)
        assert sum(w.is_decode for w in step) <= MAX_DECODE_ROWS
        for w in step:
            ran.setdefault(w.session, []).append(w.seq)
    assert all(seqs == sorted(seqs) for seqs in ran.values())
    assert sum(map(len, ran.values())) == len(items)
