"""Groups: one on a device alone, as many as keep the stages at work in a pipeline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.decode_groups import DecodeGroups, group_size
from edge_runtime.core import SessionId

MEASURED = {1: 27.0, 2: 27.0, 3: 35.0, 4: 42.0, 5: 49.0, 6: 56.0, 7: 63.0, 8: 70.0}


def linear(rows: int) -> float:
    return 50.0 + rows


@pytest.mark.parametrize(
    ("sessions", "elsewhere", "size"),
    [
        (4, 0.0, 4),  # a device alone: two halves would take 54, not 42
        (4, 1.0, 2),  # two equal stages: 54 a round instead of 84
        (4, 2.0, 2),  # three: 81 instead of 126, and four groups of one are no better
        (1, 3.0, 1),
        (8, 1.0, 4),  # 84 instead of 140
        (8, 3.0, 2),  # 108 instead of 168 with two groups
    ],
)
def test_measured_steps(sessions: int, elsewhere: float, size: int) -> None:
    assert group_size(sessions, MEASURED.__getitem__, elsewhere) == size


@given(sessions=st.integers(1, 64), elsewhere=st.floats(0, 20))
def test_a_round_is_never_longer_than_with_everybody_in_one_group(sessions: int, elsewhere: float) -> None:
    size = group_size(sessions, linear, elsewhere)
    assert 1 <= size <= sessions
    groups = -(-sessions // size)
    one = (1 + elsewhere) * linear(sessions)
    assert max(groups * linear(size), (1 + elsewhere) * linear(size)) <= one


def test_what_was_never_measured_does_not_divide() -> None:
    assert group_size(5, lambda _: 0.0, 1.0) == 5


def test_a_later_stage_waits_for_the_frames_of_a_group_and_for_nobody_else() -> None:
    groups = DecodeGroups(forms=False)
    a, b, c = SessionId(1), SessionId(2), SessionId(3)
    for session in (a, b, c):
        groups.came(session, 0.0)
    groups.ended([a, b, c], 0.030, 0.030)
    groups.came(a, 0.060)
    assert 0 < groups.company_seconds(1, 0.060) < 0.003
    groups.came(b, 0.0605)
    assert groups.company_seconds(2, 0.0605) > 0  # c was with them the last time
    assert groups.company_seconds(2, 0.065) == 0
    groups.ended([a, b], 0.030, 0.095)
    groups.came(a, 0.100)
    groups.came(b, 0.100)
    assert groups.company_seconds(2, 0.100) == 0  # c goes by itself now
    assert groups.most() is None


def settled(*groups: tuple[int, ...]) -> DecodeGroups:
    """Of a first stage, with equal stages behind it; each of these went together the last time."""
    found = DecodeGroups()
    for rows in range(1, 5):
        found.ended([SessionId(9)] * rows, 1e-3 * MEASURED[rows], 0.0)
    for group in groups:
        for session in group:
            found.came(SessionId(session), 0.0)
    for group in groups:
        found.ended([SessionId(session) for session in group], 0.027, 0.027)
    found.came(SessionId(groups[0][0]), 0.057)  # away for 1.1 steps
    assert found.most() == 2
    return found


def test_a_row_waits_for_company_while_there_are_more_groups_than_there_should_be() -> None:
    four, three = settled((1,), (2,), (3,), (4,)), settled((1,), (2,), (3,))
    assert four.company_seconds(1, 0.057) > 0
    assert three.company_seconds(1, 0.057) > 0
    four.came(SessionId(2), 0.060)
    assert four.company_seconds(2, 0.060) == 0
    assert settled((1,), (2, 3)).company_seconds(1, 0.057) == 0  # two whole groups, as there should be
    assert settled((1,), (2,), (3, 4)).company_seconds(1, 0.057) > 0


def test_who_waited_in_vain_goes_twice_as_often_without_waiting_each_time() -> None:
    groups, now = settled((1,), (2,), (3,), (4,)), 0.057
    waits = []
    for _ in range(24):  # the others stay away
        groups.came(SessionId(1), now)
        waits.append(groups.company_seconds(1, now) > 0)
        now += 0.1
        assert groups.company_seconds(1, now) == 0
        groups.ended([SessionId(1)], 0.027, now)
    assert "".join(".W"[wait] for wait in waits) == "W.W..W....W........W...."


def test_a_size_that_was_held_up_when_it_was_measured_is_tried_again() -> None:
    groups, four = DecodeGroups(), [SessionId(number) for number in range(4)]
    now = 0.0
    for session in four:
        groups.came(session, now)
    groups.ended(four[:2], 0.060, now)  # held up; 0.027 as a rule
    sizes = []
    for _ in range(40):
        now += 0.036
        groups.ended(four, 0.036, now)
        now += 0.036  # on the other stage
        for session in four:
            groups.came(session, now)
        sizes.append(groups.most())
    assert sizes[0] == 4
    assert sizes[-1] == 2


def test_a_device_alone_does_not_divide_however_long_ago_it_tried() -> None:
    groups, four = DecodeGroups(), [SessionId(number) for number in range(4)]
    now = 0.0
    for session in four:
        groups.came(session, now)
    groups.ended(four[:2], 0.027, now)
    for _ in range(400):
        now += 0.036
        groups.ended(four, 0.036, now)
        for session in four:
            groups.came(session, now)
        assert groups.most() in (None, 4)


def test_one_group_of_all_learns_how_long_it_is_away_in_either_direction() -> None:
    groups, four = DecodeGroups(), [SessionId(number) for number in range(4)]
    now = 0.0
    for session in four:
        groups.came(session, now)
    groups.ended(four[:2], 0.030, now)
    sizes = []
    for away_seconds in (
        0.004,
        *[0.038] * 12,
    ):  # the first time the other stage was quick, or it was not looked at
        now += 0.036
        groups.ended(four, 0.036, now)
        now += away_seconds
        for session in four:
            groups.came(session, now)
        sizes.append(groups.most())
    assert sizes[0] == 4
    assert sizes[-1] == 2
