"""The formula of the streamed pipeline, the expectation that choices rest on, and the choices."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.speculative.controller import (
    NOTHING,
    PROBE,
    Choice,
    Controller,
    Limits,
    choose,
    mean_acceptance,
    streamed_rate,
)
from edge_runtime.speculative.estimates import Measured
from edge_runtime.speculative.stream_model import cycle, survival

LAPTOP = Measured((0.85,) * 6, 0.1406, 0.14, 0.004, 0.010, 0.00005)
HOPELESS = replace(LAPTOP, acceptance=(0.01,) * 6, verdicts=50)


def test_the_rate_is_that_of_the_published_table() -> None:
    """Acceptance 0.85, R = 100 ms, four stages, laptop draft: 38.9 tokens/s (research note, section 5)."""
    assert streamed_rate(LAPTOP, 3, 64) == pytest.approx(38.9, rel=0.01)


@given(
    st.floats(0.05, 0.95), st.floats(0.05, 0.5), st.floats(0.001, 0.02), st.integers(1, 64), st.integers(1, 8)
)
def test_the_expectation_is_the_formulas_where_the_delay_lies_in_the_ring(
    acceptance: float, loop: float, draft: float, window: int, chunk: int
) -> None:
    """With floor = loop the floor never helps; windows that fill the loop cost what the formula says."""
    one = Measured((acceptance,) * 6, loop, loop, draft, 0.0)
    found = cycle(one, 1, window)
    exact = 1 / (acceptance * draft + (1 - acceptance) * loop)
    assert 0.999 / loop <= found.rate <= exact * 1.04
    assert found.drafts - found.accepted <= window + 1e-9
    if window * draft >= loop:
        assert found.rate == pytest.approx(exact, rel=0.04)
    assert cycle(one, chunk, window).rate <= found.rate * (1 + 1e-9)


def test_windows_end_where_another_draft_is_hardly_ever_judged() -> None:
    """Acceptance 0.6 over a loop that holds 20 drafts: the twentieth is judged once in 20 000 times."""
    coin = replace(LAPTOP, acceptance=(0.6,) * 6, loop_seconds=0.08, floor_seconds=0.08)
    choice = choose(coin, Limits())
    likely = next(count for count in range(64) if survival(coin, count + 1) < choice.least_chance)
    assert 4 <= likely <= 10
    assert cycle(coin, 1, likely).rate >= 0.97 * cycle(coin, 1, 64).rate
    sure = replace(coin, acceptance=(0.99,) * 6)
    assert survival(sure, 20) >= choose(sure, Limits()).least_chance


def test_frames_grow_only_where_waiting_for_them_costs_less_than_their_headers() -> None:
    assert choose(replace(LAPTOP, draft_seconds=0.02), Limits()).chunk == 1
    assert choose(replace(LAPTOP, draft_seconds=0.0005), Limits()).chunk > 1


def test_rows_that_the_target_runs_slowly_are_not_sent_faster_than_it_runs_them() -> None:
    slow = replace(LAPTOP, service_row_seconds=0.02)
    assert choose(slow, Limits()).window < choose(LAPTOP, Limits()).window
    assert cycle(slow, 1, 64).rate < 1 / 0.02


def test_a_loaded_target_gets_only_what_is_nearly_sure() -> None:
    idle, loaded = (choose(LAPTOP, Limits(), load=load) for load in (0.0, 1.0))
    assert idle.least_chance < survival(LAPTOP, 4)
    assert loaded.least_chance >= 0.85


def test_drafts_that_do_not_pay_are_not_made() -> None:
    assert choose(HOPELESS, Limits()) == NOTHING
    assert choose(replace(HOPELESS, verdicts=0), Limits()) != NOTHING
    far = replace(HOPELESS, acceptance=(0.5,) * 6, loop_seconds=0.4, floor_seconds=0.03)
    assert choose(far, Limits()) == NOTHING  # the target is past them when they arrive


def test_after_nothing_it_probes_at_longer_and_longer_intervals_until_drafts_pay_again() -> None:
    controller, measured, probes = Controller(), replace(HOPELESS, verdicts=100), []
    for ids in range(1, 400):
        choice = controller.choose(measured, ids)
        assert choice in (NOTHING, PROBE)
        assert choice.least_chance > 1.0
        if choice == PROBE:
            probes.append(ids)
            measured = replace(measured, verdicts=measured.verdicts + 1)
    starts = [at for at, before in zip(probes, [-9, *probes], strict=False) if at > before + 1]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert starts[0] >= 16
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 128
    assert len(probes) == 4 * len(starts)
    better = replace(LAPTOP, verdicts=measured.verdicts + 20)
    assert controller.choose(better, 401).window > 0


def test_a_choice_holds_for_a_few_verdicts() -> None:
    controller = Controller()
    first = controller.choose(replace(LAPTOP, verdicts=1), 1)
    assert controller.choose(replace(HOPELESS, verdicts=2), 2) is first
    assert controller.choose(replace(HOPELESS, verdicts=30), 3) == NOTHING
    assert isinstance(first, Choice)


def test_acceptance_that_sinks_with_depth_counts_as_often_as_it_is_judged() -> None:
    sinking = replace(LAPTOP, acceptance=(1.0, 0.5, 0.0, 0.0, 0.0, 0.0))
    assert mean_acceptance(sinking, 1) == 1.0
    assert mean_acceptance(sinking, 2) == pytest.approx(0.75)
