"""From the cluster's state to the planner's inputs, and which of its two questions to ask.

Knows: when a plan is made and when one is mended, and what may be given up to serve at all. Does not know: how a plan
is found (`planning/`). Pure.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.decisions import Limits
from coordinator.planning import place, replan
from coordinator.planning.model import ModelProfile, Plan, Split
from coordinator.state import ClusterState
from edge_runtime.bundle.manifest import Block, Manifest
from edge_runtime.errors import PlanError

FLOAT32_BYTES = 4


def model_profile(manifest: Manifest, kv_tokens_wanted: int) -> ModelProfile:
    """A slice that two blocks share counts where it is met first: a tied head costs little beside the embedding."""
    model = manifest.model

    def size_bytes(block: Block, without: frozenset[str] = frozenset()) -> int:
        return sum(manifest.slices[key].size_bytes for key in set(block.slices) - without)

    embedding = frozenset(manifest.embedding.slices)
    return ModelProfile(
        layer_weight_bytes=tuple(size_bytes(layer) for layer in manifest.layers),
        embedding_bytes=size_bytes(manifest.embedding),
        head_bytes=size_bytes(manifest.head, embedding),
        tied=bool(embedding & set(manifest.head.slices)),
        hidden_bytes_per_row=model.hidden_size * FLOAT32_BYTES,
        kv_bytes_per_token_per_layer=model.kv_bytes_per_token_per_layer,
        kv_tokens_wanted=min(kv_tokens_wanted, model.max_context_tokens),
    )


def plan_for(state: ClusterState, now: float, *, model: ModelProfile, split: Split, limits: Limits) -> Plan:
    """A first plan, or the last one mended. Raises PlanError."""
    usable = sorted(
        state.usable(now, limits.exclude_seconds), key=lambda device: (device.joined_at, device.device_id)
    )
    profiles = [device.profile for device in usable if device.profile is not None]
    present = {profile.name for profile in profiles}
    wanted = replace(split, devices=tuple(name for name in split.devices if name in present))
    if state.pipeline is None:
        return place(profiles, state.links, model, wanted)
    try:
        return replan(state.pipeline.plan, profiles, state.links, model, wanted)
    except PlanError as error:
        if split.kind == "auto":
            raise
        return _given_up(split, error, place(profiles, state.links, model, Split("auto")))


def _given_up(split: Split, error: PlanError, plan: Plan) -> Plan:
    """Serving in another split beats not serving in the one that was asked for."""
    reason = f"the split that was asked for ({split.kind}) can't be kept: {error.message}"
    return replace(plan, reasons=(reason, *plan.reasons))
