"""What a member of a pipeline is told to load.

Knows: plans and the message. Does not know: links, or when it is sent. Pure.
"""

from __future__ import annotations

from coordinator.planning.model import Plan
from coordinator.state import Pipeline
from edge_runtime.core import LayerRange
from edge_runtime.experts.peer_shares import pack_experts
from edge_runtime.protocol.expert_messages import ExpertShare
from edge_runtime.protocol.messages import HOLDS_EXPERTS, LoadStage


def load_order(pipeline: Pipeline, device_id: str, bundle: str) -> LoadStage:
    """Of a stage, or of a device that holds experts for the stages."""
    plan = pipeline.plan
    number = pipeline.members.index(device_id) if device_id in pipeline.members else HOLDS_EXPERTS
    layers = plan.stages[number].layers if number != HOLDS_EXPERTS else _all_layers(plan)
    return LoadStage(
        lease=pipeline.lease,
        bundle=bundle,
        stage=number,
        devices=pipeline.members,
        first_layer=layers.first,
        last_layer=layers.last,
        prefill_chunk_tokens=plan.prefill_chunk_tokens,
        wire=plan.formats.wire,
        kv=plan.formats.kv,
        shares=_shares(plan, layers),
        experts_on_flash=number != HOLDS_EXPERTS and has_choice(plan),
    )


def has_choice(plan: Plan) -> bool:
    """Whether experts that others hold are on the flash of those who run the layers, too."""
    return bool(plan.holders) and all(stage.expert_cache_bytes for stage in plan.stages)


def _all_layers(plan: Plan) -> LayerRange:
    return LayerRange(plan.stages[0].layers.first, plan.stages[-1].layers.last)


def _shares(plan: Plan, layers: LayerRange) -> tuple[ExpertShare, ...]:
    """Of these layers."""
    counts: dict[int, int] = {}
    for held in plan.experts:
        counts[held.layer] = max(counts.get(held.layer, 0), held.of, max(held.experts) + 1)
    return tuple(
        ExpertShare(held.device_id, held.layer, pack_experts(held.experts, counts[held.layer]))
        for held in plan.experts
        if layers.first <= held.layer <= layers.last
    )
