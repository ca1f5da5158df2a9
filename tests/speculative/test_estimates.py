"""What is measured: acceptance that starts from a prior, scores that are corrected, times that are told apart."""

from __future__ import annotations

import pytest

from edge_runtime.speculative.estimates import Estimates, Line
from edge_runtime.speculative.round_trips import RoundTrips, Sent


def test_depths_are_alike_until_they_have_verdicts_of_their_own() -> None:
    estimates = Estimates()
    for _ in range(400):
        estimates.judged("toy", 0, True)
    shallow, *_, deep = estimates.acceptance("toy")
    assert deep == pytest.approx(shallow, abs=0.05)
    for _ in range(400):
        estimates.judged("toy", 20, False)
    shallow, *_, deep = estimates.acceptance("toy")
    assert shallow > 0.7
    assert deep < 0.2
    assert estimates.acceptance("other") == pytest.approx((0.7,) * 6)


def test_scores_of_a_drafter_that_is_too_sure_are_corrected() -> None:
    estimates = Estimates()
    assert estimates.odds("toy", 0.97) == pytest.approx(1.0)
    for turn in range(300):
        estimates.judged("toy", 0, turn % 2 == 0, 0.97)
        estimates.judged("toy", 0, True, 0.5)
    assert estimates.odds("toy", 0.97) < 0.75
    assert estimates.odds("toy", 0.5) > 1.2
    assert estimates.odds("toy", None) == 1.0


def test_a_drafter_that_always_says_the_same_has_no_odds() -> None:
    estimates = Estimates()
    for turn in range(100):
        assert estimates.odds("toy", 0.85) == pytest.approx(1.0)
        estimates.judged("toy", turn % 8, turn % 3 > 0, 0.85)


def test_a_line_finds_what_a_frame_and_each_row_cost() -> None:
    line = Line()
    for rows in (1, 3, 8, 2, 5, 1):
        line.add(rows, 0.010 + 0.002 * rows)
    assert line.slope == pytest.approx(0.002)
    assert line.at(1) == pytest.approx(0.012)


def test_verdicts_that_come_slower_than_their_drafts_were_sent_are_the_targets_time() -> None:
    estimates = Estimates()
    times, now = RoundTrips(estimates), 1.0
    times.arrived([], 1, now, is_more=False)
    times.arrived([], 1, now + 0.2, is_more=True)  # the floor
    for index in range(20):  # drafts every 5 ms, verdicts every 30
        times.arrived([Sent(0.005 * index, 0.005 * index)], 1, now + 0.3 + 0.03 * index, is_more=True)
    assert estimates.measured().service_seconds == pytest.approx(0.03)
    for index in range(20, 60):  # and then no faster than they are sent
        times.arrived([Sent(0.005 * index, 0.005 * index)], 1, now + 0.9 + 0.005 * (index - 20), is_more=True)
    assert estimates.measured().service_seconds < 0.01


def test_the_targets_own_pace_is_measured_for_as_long_as_nothing_is_drafted() -> None:
    """Two ids that arrive together once must not say for ever that no draft is worth sending."""
    estimates = Estimates()
    times, now = RoundTrips(estimates), 1.0
    times.arrived([], 1, now, is_more=False)
    times.arrived([], 1, now + 0.002, is_more=False)
    assert estimates.floor_seconds == pytest.approx(0.002)
    for _ in range(16):
        now += 0.04
        times.arrived([], 1, now, is_more=False)
    assert estimates.floor_seconds > 0.03
    times.arrived([], 2, now + 0.08, is_more=False)  # at once, and each took half of it
    assert estimates.floor_seconds == pytest.approx(0.04, rel=0.2)


def test_an_id_that_a_draft_brought_is_not_the_targets_own_pace() -> None:
    estimates = Estimates()
    times = RoundTrips(estimates)
    times.arrived([], 1, 1.0, is_more=False)
    times.arrived([], 1, 1.1, is_more=True)
    times.arrived([Sent(1.01, 1.01)], 1, 1.2, is_more=False)  # the last draft: its row is sampled next
    times.arrived([], 1, 1.21, is_more=False)
    assert estimates.floor_seconds == pytest.approx(0.1)


def test_one_requests_luck_is_a_start_for_the_next_and_no_more() -> None:
    estimates = Estimates()
    for _ in range(600):
        estimates.judged("toy", 0, True, 0.95)
    (before, *_) = estimates.acceptance("toy")
    estimates.begin()
    (carried, *_) = estimates.acceptance("toy")
    assert 0.85 < carried < before  # nearer to what is believed before any verdict
    for _ in range(32):
        estimates.judged("toy", 0, False, 0.95)
    (after, *_) = estimates.acceptance("toy")
    assert after < 0.6
    assert estimates.odds("toy", 0.95) == pytest.approx(1.0, abs=0.2)
