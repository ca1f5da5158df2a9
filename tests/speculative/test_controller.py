"""The formula of the streamed pipeline, and the choices that follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_runtime.speculative.controller import Limits, choose, mean_acceptance, streamed_rate
from edge_runtime.speculative.estimates import Measured

LAPTOP = Measured((0.85,) * 6, 0.1406, 0.14, 0.004, 0.010, 0.00005)


def test_the_rate_is_that_of_the_published_table() -> None:
    """Acceptance 0.85, R = 100 ms, four stages, laptop draft: 38.9 tokens/s (research note, section 5)."""
    assert streamed_rate(LAPTOP, 3, 64) == pytest.approx(38.9, rel=0.01)


def test_a_target_slower_than_the_drafter_gets_several_ids_at_once_over_a_window_that_fills_the_loop() -> (
    None
):
    choice = choose(LAPTOP, Limits())
    assert choice.chunk == 3
    assert choice.window >= LAPTOP.loop_seconds / LAPTOP.draft_seconds
    assert choose(replace(LAPTOP, draft_seconds=0.01), Limits()).chunk == 1


def test_acceptance_that_sinks_with_depth_counts_as_often_as_it_is_judged() -> None:
    sinking = replace(LAPTOP, acceptance=(1.0, 0.5, 0.0, 0.0, 0.0, 0.0))
    assert mean_acceptance(sinking, 1) == 1.0
    assert mean_acceptance(sinking, 2) == pytest.approx(0.75)
