"""From the cluster's state to the planner's inputs, and which of its questions to ask.

Knows: who is free for a plan, and what may be given up to serve at all. Does not know: how a plan
is found (`planning/`). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_kernels.attention import SCALE_BYTES

from coordinator.decisions import Limits, host_of
from coordinator.planning import improved, place, place_all, place_another, replan
from coordinator.planning.model import DeviceProfile, ModelProfile, Plan, Split
from coordinator.planning.served import corrected
from coordinator.state import ClusterState
from edge_runtime.bundle.manifest import Block, Manifest
from edge_runtime.engine.base import DEFAULT_FORMATS, StageFormats
from edge_runtime.engine.wire import row_bytes
from edge_runtime.errors import PlanError
from edge_runtime.experts.flash_store import expert_bytes, shareable_experts, token_cycle_bytes
from edge_runtime.experts.loads import ExpertLoads


def model_profile(
    manifest: Manifest,
    kv_tokens_wanted: int,
    formats: StageFormats = DEFAULT_FORMATS,
    loads: ExpertLoads | None = None,
) -> ModelProfile:
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
        hidden_bytes_per_row=row_bytes(formats.wire, model.hidden_size),
        kv_bytes_per_token_per_layer=kv_bytes(manifest, formats.kv),
        kv_tokens_wanted=min(kv_tokens_wanted, model.max_context_tokens),
        formats=formats,
        layer_expert_bytes=tuple(expert_bytes(manifest, k, k) for k in range(manifest.num_layers)),
        layer_cycle_bytes=tuple(token_cycle_bytes(manifest, k, k) for k in range(manifest.num_layers)),
        layer_experts=layer_experts(manifest),
        expert_loads=loads.shares() if loads is not None else (),
    )


def layer_experts(manifest: Manifest) -> tuple[int, ...]:
    """How many of each layer several devices may share."""
    return tuple(shareable_experts(manifest, layer) for layer in range(manifest.num_layers))


def kv_bytes(manifest: Manifest, format: str) -> int:
    """Of one token in one layer: the manifest counts fp32."""
    full = manifest.model.kv_bytes_per_token_per_layer
    if format == "fp32":
        return full
    operations = [o for layer in manifest.layers for o in layer.operations if o.kind == "attention"]
    shapes = {(int(o.attributes["kv_heads"]), int(o.attributes["head_dim"])) for o in operations}
    return max((2 * heads * (size + SCALE_BYTES) for heads, size in shapes), default=full)


class Placer:
    """Answers the three questions of the control loop. All of them raise PlanError with the reason."""

    def __init__(self, model: ModelProfile, split: Split, limits: Limits) -> None:
        self._model = model
        self._split = split
        self._limits = limits

    def first(self, state: ClusterState, now: float) -> tuple[Plan, ...]:
        """The first plan, with its replicas."""
        profiles = self._free(state, now, 0)
        wanted = self._present(profiles)
        plans = place_all(profiles, state.links, self._model, wanted)
        return (self._marked(plans[0], wanted), *plans[1:])

    def mended(self, state: ClusterState, now: float, lease: int) -> Plan:
        """In the place of the pipeline of this lease, over its survivors and whoever is in no other."""
        pipeline = state.find(lease)
        if pipeline is None:
            raise PlanError(f"there is no pipeline of lease {lease}")
        profiles = self._free(state, now, lease)
        is_first = state.pipelines[0].lease == lease
        wanted = self._present(profiles) if is_first else replace(self._split, devices=())
        try:
            plan = replan(pipeline.plan, profiles, state.links, self._model, wanted)
        except PlanError as error:
            if self._split.kind == "auto" or not profiles:
                raise
            return _given_up(self._split, error, place(profiles, state.links, self._model, Split("auto")))
        return self._marked(plan, wanted)

    def another(self, state: ClusterState, now: float) -> Plan:
        """One more pipeline out of devices that stand by."""
        plans = [pipeline.plan for pipeline in state.pipelines]
        profiles = self._profiles(state, now)
        plan = place_another(plans, profiles, state.links, self._model, self._split)
        return replace(plan, reasons=("a replica, out of devices that stood by", *plan.reasons))

    def better(self, state: ClusterState, now: float, lease: int) -> Plan | None:
        """What is worth loading in the place of a pipeline that serves; None: nothing."""
        pipeline = state.find(lease)
        if pipeline is None:
            return None
        profiles = self._free(state, now, lease)
        wanted = self._present(profiles)
        plan = improved(pipeline.plan, profiles, state.links, self._model, wanted)
        if plan is None:
            return None
        marked = self._marked(plan, wanted)
        return None if marked.is_fallback and pipeline.plan.is_fallback else marked

    def _profiles(self, state: ClusterState, now: float) -> list[DeviceProfile]:
        usable = sorted(
            state.usable(now, self._limits.exclude_seconds),
            key=lambda device: (device.joined_at, device.device_id),
        )
        return [
            corrected(replace(device.profile, host=host_of(device.data_address)), device.served, self._model)
            for device in usable
            if device.profile is not None
        ]

    def _free(self, state: ClusterState, now: float, lease: int) -> list[DeviceProfile]:
        busy = state.members_of_others(lease)
        return [profile for profile in self._profiles(state, now) if profile.device_id not in busy]

    def _present(self, profiles: Sequence[DeviceProfile]) -> Split:
        """The split that was asked for, over those of its devices that are there."""
        present = {profile.name for profile in profiles}
        return replace(self._split, devices=tuple(name for name in self._split.devices if name in present))

    def _marked(self, plan: Plan, wanted: Split) -> Plan:
        """A split over fewer devices than were named for it is not what was asked for."""
        is_short = self._split.kind != "auto" and len(plan.everyone) < len(self._split.devices)
        return replace(plan, is_fallback=True) if is_short and wanted.devices != self._split.devices else plan


def _given_up(split: Split, error: PlanError, plan: Plan) -> Plan:
    """Serving in another split beats not serving in the one that was asked for."""
    reason = f"the split that was asked for ({split.kind}) can't be kept: {error.message}"
    return replace(plan, reasons=(reason, *plan.reasons), is_fallback=True)
