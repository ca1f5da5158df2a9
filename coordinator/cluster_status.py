"""What people and programs are shown of the cluster, made from its state.

Knows: how each part of the state reads. Does not know: HTTP, or how the state came about. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from coordinator.journal.base import DeviceEntry
from coordinator.planning.model import Split
from coordinator.planning.served import predicted_tokens_per_second
from coordinator.service import DeviceStatus, DraftStatus, PlanStatus, RequestStatus
from coordinator.sessions.draft_ledger import DraftCounts
from coordinator.sessions.generation import Generation
from coordinator.state import ClusterState, Device, Pipeline


def device_statuses(
    state: ClusterState, paired: Iterable[DeviceEntry], now: float, exclude_seconds: float
) -> tuple[DeviceStatus, ...]:
    return tuple(_device(state, entry, now, exclude_seconds) for entry in paired)


def _device(state: ClusterState, entry: DeviceEntry, now: float, exclude_seconds: float) -> DeviceStatus:
    device = state.devices.get(entry.device_id)
    layers, weight_bytes = _held(state, device)
    label, reason = _label(state, entry, device, now, exclude_seconds)
    return DeviceStatus(
        id=entry.device_id,
        name=entry.name,
        state=label,
        reason=reason,
        pid=device.pid if device is not None and device.is_connected else 0,
        layers=layers,
        weight_bytes=weight_bytes,
        memory_budget_bytes=device.memory_budget_bytes if device is not None else 0,
        rtt_seconds=device.link.rtt_seconds if device is not None and device.link is not None else 0.0,
        last_seen_seconds=max(0.0, now - device.last_seen) if device is not None else 0.0,
    )


def draft_statuses(drafts: Mapping[str, DraftCounts]) -> tuple[DraftStatus, ...]:
    return tuple(
        DraftStatus(source, counts.drafted, counts.accepted, counts.wasted)
        for source, counts in sorted(drafts.items())
    )


def _pipeline_of(state: ClusterState, device: Device | None) -> Pipeline | None:
    """The one it is a member of, unless that is over."""
    if device is None:
        return None
    return next((p for p in state.pipelines if not p.broken and device.device_id in p.everyone), None)


def _held(state: ClusterState, device: Device | None) -> tuple[tuple[int, int] | None, int]:
    """(layers, weight bytes) of the device's stage."""
    pipeline = _pipeline_of(state, device)
    if pipeline is None or device is None:
        return None, 0
    for stage, part in zip(pipeline.stages, pipeline.plan.stages, strict=True):
        if stage.device_id == device.device_id:
            weight_bytes = stage.ready.weight_bytes if stage.ready is not None else part.weight_bytes
            return (part.layers.first, part.layers.last), weight_bytes
    for holder in pipeline.plan.holders:
        if holder.device_id == device.device_id:
            return None, holder.weight_bytes
    return None, 0


def _label(
    state: ClusterState, entry: DeviceEntry, device: Device | None, now: float, exclude_seconds: float
) -> tuple[str, str]:
    """(state, reason)"""
    if entry.revoked:
        return "revoked", "it was revoked and can't come back under its key"
    if device is None:
        return "offline", "it has not connected since the coordinator started"
    if not device.is_connected:
        return "offline", device.left_because
    if now < device.rests_until(exclude_seconds):
        return "excluded", device.failure
    if device.probing_since is not None:
        return "probing", "it measures itself on this model"
    if not device.is_measured:
        return "joining", "its link is being measured, or another device on its host is"
    return _label_of_member(state, device)


def _label_of_member(state: ClusterState, device: Device) -> tuple[str, str]:
    pipeline = _pipeline_of(state, device)
    if pipeline is None:
        whole = [each for each in state.pipelines if not each.broken]
        if not whole:
            return "ready", state.refusal or "a plan is being made"
        reason = next((p.plan.excluded[device.name] for p in whole if device.name in p.plan.excluded), "")
        return (
            ("excluded", reason) if reason else ("ready", "it stands by: the pipeline is complete without it")
        )
    stage = pipeline.parts[pipeline.everyone.index(device.device_id)]
    if stage.ready is None:
        return "loading", "it fetches and loads its layers"
    holder = next((h for h in pipeline.plan.holders if h.device_id == device.device_id), None)
    if holder is not None:
        return "serving", f"it holds {holder.experts} experts for {pipeline.plan.stages[0].name}"
    if not stage.ready.row_invariant:
        return "serving", "its rows depend on their neighbours: it runs fixed chunks and shares no batches"
    return "serving", ""


def plan_statuses(
    state: ClusterState, split: Split, measured_tokens_per_second: Callable[[int], float]
) -> tuple[PlanStatus, ...]:
    """Of every pipeline; `measured_tokens_per_second` is asked with its lease."""
    return tuple(
        _plan_status(state, pipeline, split, measured_tokens_per_second(pipeline.lease))
        for pipeline in state.pipelines
    )


def _plan_status(
    state: ClusterState, pipeline: Pipeline, split: Split, measured_tokens_per_second: float
) -> PlanStatus:
    broken = (f"over: {pipeline.broken}",) if pipeline.broken else ()
    refusal = (f"no new plan: {state.refusal}",) if state.refusal else ()
    is_first = pipeline is state.pipelines[0]
    served = {key: device.served for key, device in state.devices.items() if device.served is not None}
    wants_more = split.replicas == 0 or len(state.pipelines) < split.replicas
    replicas = (f"no further replica: {state.replica_refusal}",) if is_first and wants_more else ()
    told = (
        ()
        if not state.replica_refusal or state.replica_refusal in " ".join(pipeline.plan.reasons)
        else replicas
    )
    return PlanStatus(
        lease=pipeline.lease,
        ready=pipeline.is_ready,
        split=split_text(split),
        stages=tuple((part.name, part.layers.first, part.layers.last) for part in pipeline.plan.stages),
        holders=tuple((part.name, part.experts, part.weight_bytes) for part in pipeline.plan.holders),
        predicted_tokens_per_second=predicted_tokens_per_second(pipeline.plan, served, pipeline.lease),
        measured_tokens_per_second=measured_tokens_per_second,
        reasons=(*broken, *refusal, *pipeline.plan.reasons, *told),
    )


def split_text(split: Split) -> str:
    return ",".join(map(str, split.ranges)) if split.kind == "ranges" else split.kind


def request_status(generation: Generation, now: float) -> RequestStatus:
    if generation.is_open:
        label = "decode" if generation.has_progressed else "prefill"
    else:
        label = "recovering" if generation.was_opened else "waiting"
    age_seconds = max(now - generation.started_at, 1e-9)
    return RequestStatus(
        id=generation.key,
        state=label,
        prompt_tokens=len(generation.request.prompt_ids),
        generated_tokens=generation.generated_tokens,
        age_seconds=age_seconds,
        tokens_per_second=generation.generated_tokens / age_seconds,
    )
