"""The cluster as one frozen value: devices, pipelines, sessions, and what follows from them.

Knows: what is so. What an event makes of it is `changes`, what to do next is `decisions`.
Does not know: clocks, sockets, the journal. Times are seconds of the runtime's monotonic clock and come with events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from coordinator import events as ev
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, Links, Plan
from coordinator.planning.served import Served
from edge_runtime.protocol.messages import StageReady

MAX_DOUBLINGS = 5  # of the rest of a device that fails again and again


@dataclass(frozen=True, slots=True)
class Device:
    """A paired device that said hello since the coordinator started. Offline ones keep what was measured of them."""

    device_id: str
    name: str
    boot_id: str
    connection: int  # 0: not connected
    data_address: str
    memory_budget_bytes: int
    joined_at: float
    last_seen: float
    link: Link | None = None
    probing_since: float | None = None
    profile: DeviceProfile | None = None
    served: Served | None = None  # since its agent started; it puts the profile right
    pid: int = 0
    steps: int = 0  # of its compute thread, as its heartbeats say
    steps_at: float = 0.0  # when they were last seen to move
    beat_at: float = 0.0
    failure: str = ""  # why it is not used for now
    failed_at: float = 0.0
    failures: int = 0  # in a row: each makes the next rest longer
    left_because: str = ""

    @property
    def is_connected(self) -> bool:
        return self.connection != 0

    @property
    def is_measured(self) -> bool:
        return self.link is not None and self.profile is not None

    def rests_until(self, exclude_seconds: float) -> float:
        """Left out until then, after a failure: longer each time, or a device that lies would stop the others again
        and again."""
        if not self.failure:
            return -float("inf")
        longer = 2.0 ** min(self.failures - 1, MAX_DOUBLINGS)
        return self.failed_at + exclude_seconds * longer

    def is_usable(self, now: float, exclude_seconds: float) -> bool:
        return self.is_connected and self.is_measured and now >= self.rests_until(exclude_seconds)


@dataclass(frozen=True, slots=True)
class StageState:
    device_id: str
    moved_at: float  # last sign of progress in loading
    ready: StageReady | None = None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A plan under a lease. It is live from the last StageReady until `broken` says why it is over."""

    lease: int
    plan: Plan
    stages: tuple[StageState, ...]
    load_sent: bool = False
    announced: bool = False
    broken: str = ""
    holders: tuple[StageState, ...] = ()  # of experts, without layers
    faults: tuple[
        ev.StageFaulted, ...
    ] = ()  # since it last brought anybody anything, one per device and request

    @property
    def is_ready(self) -> bool:
        return not self.broken and all(each.ready is not None for each in self.parts)

    @property
    def parts(self) -> tuple[StageState, ...]:
        """Whoever loads something."""
        return (*self.stages, *self.holders)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Whoever it can't do without."""
        return tuple(part.device_id for part in self.parts)

    @property
    def members(self) -> tuple[str, ...]:
        """Who runs layers, in order: the last one is the tail."""
        return tuple(stage.device_id for stage in self.stages)

    @property
    def kv_capacity_tokens(self) -> int:
        return min(stage.ready.kv_capacity_tokens for stage in self.stages if stage.ready is not None)

    @property
    def is_row_invariant(self) -> bool:
        """Rows are the same whatever runs beside them, so that one session may use another's."""
        return all(stage.ready is not None and stage.ready.row_invariant for stage in self.stages)

    @property
    def class_map(self) -> tuple[str, ...]:
        """The numeric class of each layer."""
        return tuple(
            stage.ready.numeric_class
            for stage, part in zip(self.stages, self.plan.stages, strict=True)
            if stage.ready is not None
            for _ in range(len(part.layers))
        )


@dataclass(frozen=True, slots=True)
class Session:
    key: str
    tenant: str
    order: int
    rows: int
    class_map: tuple[str, ...]
    since: float  # when it began to wait
    lease: int = 0  # open under it; 0: waiting
    is_recovering: bool = False  # it was open before
    attempts: int = 0  # in a row that brought nothing
    not_before: float = 0.0
    last_reason: str = ""
    stall: ev.SessionStalled | None = None  # of this opening


@dataclass(frozen=True, slots=True)
class ClusterState:
    started_at: float = 0.0
    devices: Mapping[str, Device] = field(default_factory=lambda: MappingProxyType({}))
    pipelines: tuple[
        Pipeline, ...
    ] = ()  # over disjoint devices; the first is the one a caller's split is about
    retired: tuple[
        tuple[str, int], ...
    ] = ()  # (device, lease) pairs that may still hold weights of an older plan
    sessions: Mapping[str, Session] = field(default_factory=lambda: MappingProxyType({}))
    next_order: int = 0
    revision: int = 0  # moves when there may be a plan where there was none
    refused_revision: int = -1
    refused_at: float = 0.0
    refusal: str = ""
    replica_revision: int = -1  # at which no further replica was possible, and why
    replica_refused_at: float = 0.0
    replica_refusal: str = ""
    reviewed_revision: int = -1  # at which no better plan was found
    idle_since: float = 0.0  # when the last session ended
    down_since: float | None = 0.0  # since when no pipeline serves; None: one does

    @property
    def pipeline(self) -> Pipeline | None:
        """The first one, live or not."""
        return self.pipelines[0] if self.pipelines else None

    @property
    def serving(self) -> list[Pipeline]:
        return [pipeline for pipeline in self.pipelines if pipeline.is_ready]

    @property
    def live(self) -> Pipeline | None:
        """The first one that serves."""
        return next(iter(self.serving), None)

    def find(self, lease: int) -> Pipeline | None:
        return next((pipeline for pipeline in self.pipelines if pipeline.lease == lease), None)

    def members_of_others(self, lease: int) -> set[str]:
        """Devices of every pipeline that is not broken, but the one of this lease."""
        return {m for p in self.pipelines if p.lease != lease and not p.broken for m in p.everyone}

    @property
    def waiting(self) -> list[Session]:
        return [session for session in self.sessions.values() if not session.lease]

    @property
    def open_sessions(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.lease]

    def usable(self, now: float, exclude_seconds: float) -> list[Device]:
        return [device for device in self.devices.values() if device.is_usable(now, exclude_seconds)]

    @property
    def links(self) -> Links:
        """Both ways between the coordinator and every measured device."""
        table: dict[tuple[str, str], Link] = {}
        for device in self.devices.values():
            if device.link is not None:
                table[device.device_id, COORDINATOR] = device.link
                table[COORDINATOR, device.device_id] = device.link
        return table
