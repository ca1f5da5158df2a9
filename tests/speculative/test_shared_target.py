"""A target that many share, simulated: drafts never cost the others what they bring, and abuse costs nobody much."""

from __future__ import annotations

import pytest

from benchmarks.simulator.crowd import Crowd, Target, User
from benchmarks.simulator.model import plain_loop
from benchmarks.simulator.saturation import WARM_SECONDS, measure
from edge_runtime.core import SamplingParams

SECONDS = 2.0


@pytest.mark.parametrize("acceptance", [0.05, 0.6, 0.93])
def test_a_saturated_target_commits_no_less_with_drafts_and_wastes_little(acceptance: float) -> None:
    drafted = measure([User(acceptance)] * 8, Target(), SECONDS)
    plain = measure([User()] * 8, Target(), SECONDS)
    assert drafted.load == plain.load == 1.0
    assert drafted.goodput >= 0.99 * plain.goodput
    assert drafted.wasted_fraction <= 0.15


def test_nobody_slows_down_beside_one_who_floods() -> None:
    others = [User(), User(0.9), User()]
    calm = measure([*others, User()], Target(), 2 * SECONDS)
    wild = measure([*others, User(floods=200.0)], Target(), 2 * SECONDS)
    for new, old in zip(wild.rates[:3], calm.rates[:3], strict=True):
        assert new >= 0.9 * old


def test_a_flood_buys_hardly_any_rows() -> None:
    crowd = Crowd([User(), User(floods=500.0)], Target()).run(6.0)
    flooding = crowd.requests[2].ledger.counts
    assert (flooding.accepted, flooding.drafted) == (0, flooding.wasted)
    assert flooding.drafted <= 128 + 0.125 * len(crowd.requests[2].ids)
    assert crowd.rows_run >= flooding.drafted


def test_ids_are_those_of_the_plain_loop_for_everybody() -> None:
    crowd = Crowd([User(), User(0.9), User(0.3), User(floods=100.0)], Target()).run(WARM_SECONDS)
    for request in crowd.requests.values():
        wanted = plain_loop(request.ids[:5], len(request.ids), SamplingParams(temperature=0.0))
        assert request.ids == wanted
        assert len(request.ids) > 20
