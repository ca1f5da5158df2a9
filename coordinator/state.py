"""The cluster as one frozen value, and what an event makes of it.

Knows: devices, the pipeline and sessions, and how each event changes them (`apply`). What to do next is `decisions`.
Does not know: clocks, sockets, the journal. Times are seconds of the runtime's monotonic clock and come with events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from coordinator import events as ev
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, Links, Plan
from edge_runtime.protocol.messages import StageReady


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
    faults: tuple[
        ev.StageFaulted, ...
    ] = ()  # since it last brought anybody anything, one per device and request

    @property
    def is_ready(self) -> bool:
        return not self.broken and all(stage.ready is not None for stage in self.stages)

    @property
    def members(self) -> tuple[str, ...]:
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
        return {m for p in self.pipelines if p.lease != lease and not p.broken for m in p.members}

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


RETRY_FIRST_SECONDS = 0.05
RETRY_MOST_SECONDS = 2.0
MAX_FAULTS = 32  # remembered of one pipeline
MAX_DOUBLINGS = 5  # of the rest of a device that fails again and again
FORGET_FAILURES_SECONDS = 3600.0


def apply(state: ClusterState, event: ev.Event) -> ClusterState:
    """The state after `event`. Late, repeated and unknown things change nothing."""
    match event:
        case ev.DeviceJoined():
            return _joined(state, event)
        case ev.DeviceSeen():
            return _on_connection(state, event.device_id, event.connection, last_seen=event.at)
        case ev.DeviceStepped():
            return _stepped(state, event)
        case ev.LinkMeasured():
            link = Link(event.rtt_seconds, event.bytes_per_second)
            return _on_connection(state, event.device_id, event.connection, link=link)
        case ev.ProfileAsked():
            return _change_device(state, event.device_id, probing_since=event.at)
        case ev.ProfileArrived():
            return _revise(
                _on_connection(
                    state,
                    event.device_id,
                    event.connection,
                    profile=event.profile,
                    probing_since=None,
                    failure="",
                )
            )
        case ev.DeviceFailed():
            return _failed(state, event.device_id, event.reason, event.at)
        case ev.DeviceLost():
            return _lost(state, event.device_id, event.connection, event.reason, event.at)
        case ev.DeviceRevoked():
            return _revoked(state, event.device_id, event.at)
        case (
            ev.SessionSubmitted()
            | ev.SessionOpened()
            | ev.SessionStalled()
            | ev.SessionAsked()
            | ev.SessionRebound()
            | ev.SessionBroke()
            | ev.SessionEnded()
        ):
            return _apply_session(state, event)
        case _:
            return _apply_plan(state, event)


# ---------------------------------------------------------------- devices


def _put_device(state: ClusterState, device: Device) -> ClusterState:
    return replace(state, devices=MappingProxyType({**state.devices, device.device_id: device}))


def _change_device(state: ClusterState, device_id: str, **changes: object) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None:
        return state
    return _put_device(state, replace(device, **changes))  # type: ignore[arg-type]


def _on_connection(state: ClusterState, device_id: str, connection: int, **changes: object) -> ClusterState:
    """What an older connection of the device says is ignored."""
    device = state.devices.get(device_id)
    if device is None or device.connection != connection:
        return state
    return _change_device(state, device_id, **changes)


def _revise(state: ClusterState) -> ClusterState:
    return replace(state, revision=state.revision + 1)


def _joined(state: ClusterState, event: ev.DeviceJoined) -> ClusterState:
    before = state.devices.get(event.device_id)
    if before is not None and before.is_connected:
        state = _lost(state, event.device_id, before.connection, "it connected again", event.at)
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
            failure=before.failure,
            failed_at=before.failed_at,
            failures=before.failures,
        )
    return _revise(_put_device(state, device))


def _stepped(state: ClusterState, event: ev.DeviceStepped) -> ClusterState:
    device = state.devices.get(event.device_id)
    if device is None or device.connection != event.connection:
        return state
    moved = event.steps != device.steps
    return _put_device(
        state,
        replace(
            device,
            steps=event.steps,
            steps_at=event.at if moved else device.steps_at,
            beat_at=event.at,
        ),
    )


def _lost(state: ClusterState, device_id: str, connection: int, reason: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None or device.connection != connection or not device.is_connected:
        return state
    gone = replace(device, connection=0, link=None, probing_since=None, left_because=reason, last_seen=at)
    state = replace(
        _put_device(state, gone), retired=tuple(pair for pair in state.retired if pair[0] != device_id)
    )
    return _revise(_break_if_member(state, device_id, f"{device.name} is gone: {reason}", at))


def _revoked(state: ClusterState, device_id: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None:
        return state
    state = _lost(state, device_id, device.connection, "it was revoked", at)
    others = {key: value for key, value in state.devices.items() if key != device_id}
    return replace(state, devices=MappingProxyType(others))


def _failed(state: ClusterState, device_id: str, reason: str, at: float) -> ClusterState:
    device = state.devices.get(device_id)
    if device is None or (device.failure and device.failed_at == at):
        return state  # said already
    is_again = device.failures > 0 and at - device.failed_at < FORGET_FAILURES_SECONDS
    return _revise(
        _change_device(
            state,
            device_id,
            probing_since=None,
            failure=reason or "unknown",
            failed_at=at,
            failures=device.failures + 1 if is_again else 1,
        )
    )


def _break_if_member(state: ClusterState, device_id: str, reason: str, at: float) -> ClusterState:
    """The pipeline that lost a member is over; its sessions wait for another. Other pipelines notice nothing."""
    for pipeline in state.pipelines:
        if not pipeline.broken and device_id in pipeline.members:
            return _break(state, pipeline, reason, at)
    return state


def _break(state: ClusterState, pipeline: Pipeline, reason: str, at: float) -> ClusterState:
    state = _put_pipeline(state, pipeline.lease, replace(pipeline, broken=reason))
    state = _set_free(state, pipeline.lease, reason, at)
    is_down = state.live is None and state.down_since is None
    return replace(state, down_since=at) if is_down else state


def _set_free(state: ClusterState, lease: int, reason: str, at: float) -> ClusterState:
    """Its sessions wait, and what went wrong on it is not held against them."""
    sessions = {
        key: replace(
            session, lease=0, is_recovering=True, since=at, last_reason=reason, attempts=0, stall=None
        )
        if session.lease == lease
        else session
        for key, session in state.sessions.items()
    }
    return replace(state, sessions=MappingProxyType(sessions))


def _put_pipeline(state: ClusterState, lease: int, pipeline: Pipeline | None) -> ClusterState:
    """In the place of the one of this lease; None takes it away."""
    kept = [pipeline if each.lease == lease else each for each in state.pipelines]
    return replace(state, pipelines=tuple(each for each in kept if each is not None))


# ---------------------------------------------------------------- plans


def _apply_plan(state: ClusterState, event: ev.Event) -> ClusterState:
    match event:
        case ev.PlanInstalled():
            return _installed(state, event)
        case ev.PlanRefused():
            return replace(state, refused_revision=state.revision, refused_at=event.at, refusal=event.reason)
        case ev.PipelineDropped():
            return _dropped(state, event)
        case ev.ReplicaRefused():
            return replace(
                state,
                replica_revision=state.revision,
                replica_refused_at=event.at,
                replica_refusal=event.reason,
            )
        case ev.PlanKept():
            return replace(state, reviewed_revision=state.revision)
        case ev.UnloadSent():
            return replace(state, retired=tuple(pair for pair in state.retired if pair not in event.pairs))
        case ev.LoadSent():
            pipeline = state.find(event.lease)
            if pipeline is None:
                return state
            return _put_pipeline(state, event.lease, replace(pipeline, load_sent=True))
        case ev.StageProgressed():
            return _change_stage(state, event.device_id, event.lease, moved_at=event.at)
        case ev.StageLoaded():
            return _change_stage(
                state, event.device_id, event.ready.lease, moved_at=event.at, ready=event.ready
            )
        case ev.StageBroke():
            pipeline = state.find(event.lease)
            if pipeline is None or event.device_id not in pipeline.members:
                return state
            name = state.devices[event.device_id].name if event.device_id in state.devices else "a device"
            state = _failed(state, event.device_id, event.reason, event.at)
            return _break_if_member(state, event.device_id, f"{name}: {event.reason}", event.at)
        case ev.StageFaulted():
            return _faulted(state, event)
        case ev.PipelineAnnounced():
            pipeline = state.find(event.lease)
            if pipeline is None or not pipeline.is_ready:
                return state
            return replace(
                _put_pipeline(state, event.lease, replace(pipeline, announced=True)), down_since=None
            )
        case _:
            return state


def _installed(state: ClusterState, event: ev.PlanInstalled) -> ClusterState:
    stages = tuple(StageState(stage.device_id, event.at) for stage in event.plan.stages)
    pipeline = Pipeline(event.lease, event.plan, stages)
    old = state.find(event.replaces) if event.replaces else None
    if old is None:
        state = replace(state, pipelines=(*state.pipelines, pipeline))
    else:
        if not old.broken:
            state = _break(state, old, "a better plan takes its place", event.at)
        state = _retire(_put_pipeline(state, old.lease, pipeline), old)
    state = replace(
        state,
        retired=tuple(pair for pair in state.retired if pair[0] not in pipeline.members),
        refusal="",
        refused_revision=-1,
        reviewed_revision=state.revision,
    )
    for member in pipeline.members:  # one may have left while the lease was drawn
        device = state.devices.get(member)
        if device is None or not device.is_connected:
            return _break_if_member(state, member, "a member left while the plan was made", event.at)
    return state


def _dropped(state: ClusterState, event: ev.PipelineDropped) -> ClusterState:
    pipeline = state.find(event.lease)
    if pipeline is None or not pipeline.broken:
        return state
    state = _retire(_put_pipeline(state, event.lease, None), pipeline)
    return replace(
        state,
        replica_revision=state.revision,
        replica_refused_at=event.at,
        replica_refusal=f"{pipeline.broken}; {event.reason}",
    )


def _retire(state: ClusterState, old: Pipeline) -> ClusterState:
    """Those of its members that are in no other pipeline may still hold weights."""
    busy = state.members_of_others(old.lease)
    left = tuple(
        (member, old.lease)
        for member in old.members
        if member not in busy and member in state.devices and state.devices[member].is_connected
    )
    return replace(state, retired=(*state.retired, *left))


def _faulted(state: ClusterState, event: ev.StageFaulted) -> ClusterState:
    pipeline = state.find(event.lease)
    if pipeline is None or event.device_id not in pipeline.members:
        return state
    known = [f for f in pipeline.faults if (f.device_id, f.key) != (event.device_id, event.key)]
    return _put_pipeline(state, event.lease, replace(pipeline, faults=(*known[-MAX_FAULTS:], event)))


def _works(state: ClusterState, lease: int) -> ClusterState:
    """It brought somebody something: what failed before was not its fault alone."""
    pipeline = state.find(lease)
    if pipeline is None or not pipeline.faults:
        return state
    return _put_pipeline(state, lease, replace(pipeline, faults=()))


def _change_stage(state: ClusterState, device_id: str, lease: int, **changes: object) -> ClusterState:
    pipeline = state.find(lease)
    if pipeline is None:
        return state
    stages = tuple(
        replace(stage, **changes) if stage.device_id == device_id else stage  # type: ignore[arg-type]
        for stage in pipeline.stages
    )
    return _put_pipeline(state, lease, replace(pipeline, stages=stages))


# ---------------------------------------------------------------- sessions


def _apply_session(
    state: ClusterState,
    event: ev.SessionSubmitted
    | ev.SessionOpened
    | ev.SessionStalled
    | ev.SessionAsked
    | ev.SessionRebound
    | ev.SessionBroke
    | ev.SessionEnded,
) -> ClusterState:
    if isinstance(event, ev.SessionSubmitted):
        new = Session(event.key, event.tenant, state.next_order, event.rows, event.class_map, event.at)
        return replace(_put_session(state, new), next_order=state.next_order + 1)
    session = state.sessions.get(event.key)
    if session is None:
        return state
    match event:
        case ev.SessionEnded():
            others = {key: value for key, value in state.sessions.items() if key != event.key}
            ended = replace(state, sessions=MappingProxyType(others), idle_since=event.at)
            return _works(ended, session.lease) if event.progressed else ended
        case ev.SessionOpened():
            return _put_session(state, replace(session, lease=event.lease, stall=None))
        case ev.SessionStalled():
            return (
                _put_session(state, replace(session, stall=event)) if session.lease == event.lease else state
            )
        case ev.SessionAsked():
            return _put_session(state, replace(session, stall=None))
        case ev.SessionRebound():
            return _put_session(state, replace(session, class_map=event.class_map))
        case ev.SessionBroke():
            if session.lease != event.lease:
                return state
            broke = _put_session(state, _broke(session, event))
            return _works(broke, session.lease) if event.progressed else broke


def _broke(session: Session, event: ev.SessionBroke) -> Session:
    attempts = 1 if event.progressed else session.attempts + 1
    pause_seconds = min(RETRY_MOST_SECONDS, RETRY_FIRST_SECONDS * 2.0 ** (attempts - 1))
    return replace(
        session,
        lease=0,
        is_recovering=True,
        since=event.at,
        attempts=attempts,
        not_before=event.at + pause_seconds,
        last_reason=event.reason,
        stall=None,
    )


def _put_session(state: ClusterState, session: Session) -> ClusterState:
    return replace(state, sessions=MappingProxyType({**state.sessions, session.key: session}))
