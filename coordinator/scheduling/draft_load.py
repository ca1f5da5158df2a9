"""How loaded a pipeline is for those who draft: what a wrong row costs others.

Sessions without drafts take turns on the stages; n of them keep the slowest stage busy all the time once n times its
step is a turn of the ring. From then on a row that is run for nothing slows somebody down, before only in part.

Knows: a plan's times, how many sessions run. Does not know: sessions, drafts, clocks.
"""

from __future__ import annotations

from coordinator.planning.model import Plan

LEVELS = 8  # what is said changes in steps, so that it need not be said often


def draft_load(sessions: int, plan: Plan) -> float:
    """0, alone, to 1: the others keep the slowest stage busy. In eighths."""
    slowest = max(stage.compute_seconds for stage in plan.stages)
    turn = sum(stage.compute_seconds + stage.hop_seconds for stage in plan.stages)
    if turn <= 0:
        return float(sessions > 1)
    return min(LEVELS, round(LEVELS * max(0, sessions - 1) * slowest / turn)) / LEVELS
