"""Devices come, are measured, fail and go; with a member goes the pipeline."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from coordinator import events as ev
from coordinator.changes.parts import break_if_member, put_device, revised
from coordinator.planning.served import Served
from coordinator.state import ClusterState, Device

FORGET_FAILURES_SECONDS = 3600.0


def change_device(state: ClusterState, device_id: str, **changes: object) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None:
        return state
    return put_device(state, replace(device, **changes))  # type: ignore[arg-type]


def on_connection(state: ClusterState, device_id: str, connection: int, **changes: object) -> ClusterState:
    """What an older connection of the device says is ignored."""
    device = state.devices.get(device_id)
    if device is None or device.connection != connection:
        return state
    return change_device(state, device_id, **changes)


def joined(state: ClusterState, event: ev.DeviceJoined) -> ClusterState:
    before = state.devices.get(event.device_id)
    if before is not None and before.is_connected:
        state = lost(state, event.device_id, before.connection, "it connected again", event.at)
    device = Device(
        event.device_id,
        event.name,
        event.boot_id,
        event.connection,
        event.data_address,
        event.memory_budget_bytes,
        joined_at=event.at,
        last_seen=event.at,
        pid=event.pid,
        steps_at=event.at,
    )
    if before is not None and before.boot_id == event.boot_id:
        device = replace(
            device,
            profile=before.profile,
            served=before.served,
            failure=before.failure,
            failed_at=before.failed_at,
            failures=before.failures,
        )
    return revised(put_device(state, device))


def stepped(state: ClusterState, event: ev.DeviceStepped) -> ClusterState:
    device = state.devices.get(event.device_id)
    if device is None or device.connection != event.connection:
        return state
    moved = event.steps != device.steps
    return put_device(
        state,
        replace(
            device,
            steps=event.steps,
            steps_at=event.at if moved else device.steps_at,
            beat_at=event.at,
            served=_served(state, event) or device.served,
        ),
    )


def _served(state: ClusterState, event: ev.DeviceStepped) -> Served | None:
    """A heartbeat that comes after a stage is ready is about that stage."""
    for pipeline in state.pipelines if event.row_seconds > 0 else ():
        for stage in pipeline.plan.stages if pipeline.is_ready else ():
            if stage.device_id == event.device_id:
                return Served(stage.layers, event.row_seconds, event.round_seconds, pipeline.lease)
    return None


def lost(state: ClusterState, device_id: str, connection: int, reason: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None or device.connection != connection or not device.is_connected:
        return state
    gone = replace(device, connection=0, link=None, probing_since=None, left_because=reason, last_seen=at)
    state = replace(
        put_device(state, gone), retired=tuple(pair for pair in state.retired if pair[0] != device_id)
    )
    return revised(break_if_member(state, device_id, f"{device.name} is gone: {reason}", at))


def revoked(state: ClusterState, device_id: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None:
        return state
    state = lost(state, device_id, device.connection, "it was revoked", at)
    others = {key: value for key, value in state.devices.items() if key != device_id}
    return replace(state, devices=MappingProxyType(others))


def failed(state: ClusterState, device_id: str, reason: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None or (device.failure and device.failed_at == at):
        return state  # said already
    is_again = device.failures > 0 and at - device.failed_at < FORGET_FAILURES_SECONDS
    return revised(
        change_device(
            state,
            device_id,
            probing_since=None,
            failure=reason or "unknown",
            failed_at=at,
            failures=device.failures + 1 if is_again else 1,
        )
    )
