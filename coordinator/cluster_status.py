"""What people and programs are shown of the cluster, made from its state.

Knows: how each part of the state reads. Does not know: HTTP, or how the state came about. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.journal.base import DeviceEntry
from coordinator.planning.model import Split
from coordinator.service import DeviceStatus, PlanStatus, RequestStatus
from coordinator.sessions.generation import Generation
from coordinator.state import ClusterState, Device, Pipeline


def device_statuses(
    state: ClusterState, paired: Iterable[DeviceEntry], now: float, exclude_seconds: float
) -> tuple[DeviceStatus, ...]:
    return tuple(_device(state, entry, now, exclude_seconds) for entry in paired)


def _device(state: ClusterState, entry: DeviceEntry, now: float, exclude_seconds: float) -> DeviceStatus:
    device = state.devices.get(entry.device_id)
    layers, weight_bytes = _held(state.pipeline, device)
    label, reason = _label(state, entry, device, now, exclude_seconds)
    return DeviceStatus(
        id=entry.device_id,
        name=entry.name,
        state=label,
        reason=reason,
        pid=0,
        layers=layers,
        weight_bytes=weight_bytes,
        memory_budget_bytes=device.memory_budget_bytes if device is not None else 0,
        rtt_seconds=device.link.rtt_seconds if device is not None and device.link is not None else 0.0,
        last_seen_seconds=max(0.0, now - device.last_seen) if device is not None else 0.0,
    )


def _held(pipeline: Pipeline | None, device: Device | None) -> tuple[tuple[int, int] | None, int]:
    """(layers, weight bytes) of the device's stage."""
    if pipeline is None or pipeline.broken or device is None:
        return None, 0
    for stage, part in zip(pipeline.stages, pipeline.plan.stages, strict=True):
        if stage.device_id == device.device_id:
            weight_bytes = stage.ready.weight_bytes if stage.ready is not None else part.weight_bytes
            return (part.layers.first, part.layers.last), weight_bytes
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
    if device.failure and now - device.failed_at < exclude_seconds:
        return "excluded", device.failure
    if device.probing_since is not None:
        return "probing", "it measures itself on this model"
    if not device.is_measured:
        return "joining", "its link is being measured, or another device on its host is"
    return _label_of_member(state, device)


def _label_of_member(state: ClusterState, device: Device) -> tuple[str, str]:
    pipeline = state.pipeline
    if pipeline is None or pipeline.broken:
        return "ready", state.refusal or "a plan is being made"
    if device.device_id not in pipeline.members:
        reason = pipeline.plan.excluded.get(device.name, "")
        return (
            ("excluded", reason) if reason else ("ready", "it stands by: the pipeline is complete without it")
        )
    stage = pipeline.stages[pipeline.members.index(device.device_id)]
    if stage.ready is None:
        return "loading", "it fetches and loads its layers"
    if not stage.ready.row_invariant:
        return "serving", "its rows depend on their neighbours: it runs fixed chunks and shares no batches"
    return "serving", ""


def plan_status(state: ClusterState, split: Split, measured_tokens_per_second: float) -> PlanStatus | None:
    pipeline = state.pipeline
    if pipeline is None:
        return None
    broken = (f"over: {pipeline.broken}",) if pipeline.broken else ()
    refusal = (f"no new plan: {state.refusal}",) if state.refusal else ()
    return PlanStatus(
        lease=pipeline.lease,
        ready=pipeline.is_ready,
        split=split_text(split),
        stages=tuple((part.name, part.layers.first, part.layers.last) for part in pipeline.plan.stages),
        predicted_tokens_per_second=pipeline.plan.predicted_tokens_per_second,
        measured_tokens_per_second=measured_tokens_per_second,
        reasons=(*broken, *refusal, *pipeline.plan.reasons),
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
