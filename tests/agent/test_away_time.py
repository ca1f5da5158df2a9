"""When rows are expected back: by what was seen, less by what was not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.away_time import PATIENCE_SECONDS, AwayTime
from edge_runtime.core import SessionId

A, B = SessionId(1), SessionId(2)


def gone_and_back(away: AwayTime, now: float, seconds: float) -> float:
    away.went([A], now)
    away.came(A, now + seconds)
    return now + seconds


def test_nothing_is_expected_before_anything_was_seen() -> None:
    away = AwayTime()
    away.went([A], 1.0)
    assert away.next_at(1.1) is None
    away.came(A, 1.2)
    assert away.next_at(1.2) is None  # it is here
    away.went([A], 2.0)
    assert away.next_at(2.0) == pytest.approx(2.2)


def test_the_first_of_several_counts_until_it_comes_or_leaves() -> None:
    away = AwayTime()
    gone_and_back(away, 0.0, 0.1)
    away.went([A], 1.0)
    away.went([B], 1.05)
    assert away.next_at(1.05) == pytest.approx(1.1)
    away.left(A)
    assert away.next_at(1.05) == pytest.approx(1.15)


def test_who_stays_away_for_ever_teaches_nothing() -> None:
    away = AwayTime()
    now = gone_and_back(away, 0.0, 0.1)
    now = gone_and_back(away, now, PATIENCE_SECONDS)
    away.went([A], now)
    assert away.next_at(now) == pytest.approx(now + 0.1)


def test_who_is_stuck_hides_nobody() -> None:
    away = AwayTime()
    gone_and_back(away, 0.0, 0.1)
    away.went([A], 1.0)
    away.went([B], 1.0 + PATIENCE_SECONDS)
    assert away.next_at(1.0 + PATIENCE_SECONDS) == pytest.approx(1.1 + PATIENCE_SECONDS)
    assert away.next_at(1.0 + 2 * PATIENCE_SECONDS) is None


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_rows_that_come_unseen_are_looked_for_earlier_until_they_are_seen(
    true: float, expected: float
) -> None:
    """Steps that fill the time as expected, and end when the row is there or is not yet: nobody is held up for long."""
    away, now = AwayTime(), gone_and_back(AwayTime(), 0.0, expected)
    gone_and_back(away, 0.0, expected)
    now = 10.0
    late = []
    for _ in range(400):
        away.went([A], now)
        due = away.next_at(now)
        assert due is not None
        away.filled(due)
        late.append(max(0.0, due - (now + true)))
        now = max(due, now + true)
        away.came(A, now)
    assert sum(late[200:]) / 200 <= 0.1 * true
