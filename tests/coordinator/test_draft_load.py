"""What wrong rows cost others, from a plan's times and how many share them."""

from __future__ import annotations

import pytest

from coordinator.planning.model import Plan, StagePlan
from coordinator.scheduling.draft_load import draft_load
from edge_runtime.core import LayerRange


def plan(*stages: tuple[float, float]) -> Plan:
    """(compute seconds, hop seconds) of each."""
    parts = tuple(
        StagePlan(str(index), str(index), LayerRange(index, index), 1, 1, compute, hop)
        for index, (compute, hop) in enumerate(stages)
    )
    return Plan(parts, 1.0, 1.0, (), {}, 64)


@pytest.mark.parametrize(
    ("sessions", "stages", "load"),
    [
        (0, ((0.01, 0.0),), 0.0),
        (1, ((0.01, 0.0),), 0.0),
        (2, ((0.01, 0.0),), 1.0),
        (2, ((0.01, 0.0), (0.01, 0.0)), 0.5),
        (3, ((0.01, 0.0), (0.01, 0.0)), 1.0),
        (2, ((0.01, 0.03), (0.01, 0.03)), 0.125),
        (9, ((0.01, 0.03), (0.01, 0.03)), 1.0),
        (2, ((0.0, 0.0),), 1.0),
    ],
)
def test_the_slowest_stage_is_busy_with_as_many_others_as_fit_a_turn(
    sessions: int, stages: tuple[tuple[float, float], ...], load: float
) -> None:
    assert draft_load(sessions, plan(*stages)) == load
