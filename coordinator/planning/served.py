"""What a device was predicted to take for a row, put right by what it took.

A profile is measured on one layer, on a device that may have been busy with starting, or idle where it will not be.
Once a device serves, the time of its steps is known: plans made from then on, and what is said of those that serve,
go by it. Knows: profiles, predictions, times of steps. Does not know: how they were measured, or what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.planning.costs import Costs
from coordinator.planning.model import DeviceProfile, ModelProfile, Plan
from edge_runtime.core import LayerRange

MOST = 4.0  # times as fast or slow as measured: beyond it, something else is wrong


@dataclass(frozen=True, slots=True)
class Served:
    """What a device last served, and how long a step with one decoded row took there, lately."""

    layers: LayerRange
    row_seconds: float
    round_seconds: float = (
        0.0  # from such a step to the next one of its session: all stages and hops; 0: unknown
    )
    lease: int = 0  # of the plan in which that was


def corrected(profile: DeviceProfile, served: Served | None, model: ModelProfile) -> DeviceProfile:
    """The profile that would have predicted what was served. Prefill stays as it was measured."""
    if served is None or served.layers.last >= model.num_layers:
        return profile
    predicted = Costs([profile], {}, model).compute_seconds(0, served.layers)
    if predicted <= 0:
        return profile
    factor = min(MOST, max(1 / MOST, served.row_seconds / predicted))
    return replace(
        profile,
        layer_decode_seconds=factor * profile.layer_decode_seconds,
        head_seconds=factor * profile.head_seconds,
    )


def predicted_tokens_per_second(plan: Plan, served: Mapping[str, Served], lease: int) -> float:
    """Of one session. `served`: by device id; stages that served nothing yet count as planned.

    Where stage 1 has seen rows come round under this lease, that is the time of a token, hops and all.
    """
    first = served.get(plan.stages[0].device_id)
    if first is not None and first.lease == lease and first.round_seconds > 0:
        return 1 / first.round_seconds
    if plan.holders:
        return plan.predicted_tokens_per_second  # what they are asked for is in nobody's stage alone
    seconds = 0.0
    for stage in plan.stages:
        found = served.get(stage.device_id)
        is_known = found is not None and found.layers == stage.layers
        seconds += stage.hop_seconds + (found.row_seconds if found and is_known else stage.compute_seconds)
    return 1 / seconds if seconds > 0 else plan.predicted_tokens_per_second
