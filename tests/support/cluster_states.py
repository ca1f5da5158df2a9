"""Cluster states and events in one line each, for tests of the rules that decide on them."""

from __future__ import annotations

from coordinator import actions as act
from coordinator import events as ev
from coordinator.changes.apply import apply
from coordinator.decisions import Limits, decide
from coordinator.planning.model import DeviceProfile, Plan, Split, StagePlan
from coordinator.state import ClusterState
from edge_runtime.core import LayerRange
from edge_runtime.protocol.messages import StageReady

LIMITS = Limits(
    settle_seconds=1.0, gather_seconds=30.0, exclude_seconds=10.0, recovery_seconds=60.0, max_attempts=3
)


AUTO = Split()


def joined(
    device: str, at: float = 0.0, connection: int = 1, boot: str = "1", address: str = ""
) -> ev.DeviceJoined:
    return ev.DeviceJoined(device, device, boot, connection, address, 1 << 30, at)


def profile(device: str, numeric_class: str = "x") -> DeviceProfile:
    return DeviceProfile(device, device, 1 << 30, 1e-3, 1e-4, 1e-3, numeric_class)


def measured(device: str, at: float = 0.0, connection: int = 1, numeric_class: str = "x") -> list[ev.Event]:
    return [
        joined(device, at, connection),
        ev.LinkMeasured(device, connection, 1e-3, 1e8),
        ev.ProfileArrived(device, connection, profile(device, numeric_class), at),
    ]


def beat(device: str, row_seconds: float, at: float = 0.0) -> ev.DeviceStepped:
    """A heartbeat that says how long its steps with one row took."""
    return ev.DeviceStepped(device, 1, 1, at, row_seconds)


def plan(*devices: str) -> Plan:
    """Two layers, over one device or the first two."""
    ranges = [LayerRange(0, 1)] if len(devices) == 1 else [LayerRange(0, 0), LayerRange(1, 1)]
    stages = tuple(StagePlan(d, d, r, 1, 1, 0.0, 0.0) for d, r in zip(devices, ranges, strict=False))
    return Plan(stages, 1.0, 1.0, (), {}, 64)


def ready(device: str, lease: int, kv: int = 1024, numeric_class: str = "x") -> ev.StageLoaded:
    return ev.StageLoaded(device, StageReady(lease, numeric_class, True, 1, kv), 0.0)


def after(*events: ev.Event, state: ClusterState | None = None) -> ClusterState:
    state = state or ClusterState()
    for event in events:
        state = apply(state, event)
    return state


def serving(*devices: str, lease: int = 1, kv: int = 1024) -> ClusterState:
    events: list[ev.Event] = [event for device in devices for event in measured(device)]
    events += [ev.PlanInstalled(lease, plan(*devices), 0.0), ev.LoadSent(lease, 0.0)]
    events += [ready(device, lease, kv) for device in devices]
    return after(*events, ev.PipelineAnnounced(lease))


def ask(state: ClusterState, now: float = 0.0, split: Split = AUTO) -> list[act.Action]:
    return decide(state, now, limits=LIMITS, split=split)


def submitted(key: str, tenant: str = "t", rows: int = 64, classes: tuple[str, ...] = ("x", "x")) -> ev.Event:
    return ev.SessionSubmitted(key, tenant, rows, classes, 0.0)
