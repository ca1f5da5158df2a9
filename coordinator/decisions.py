"""What to do next: an ordered chain of small rules over the cluster's state.

The first rule that wants something wins. Whoever carries its actions out applies their events and asks again, until no
rule wants anything: so each rule may rely on those before it being satisfied.

Knows: rules, and the limits they go by. Does not know: clocks, sockets, how plans are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.actions import (
    Action,
    AddReplica,
    AnnouncePipeline,
    AskProfile,
    AskSession,
    DropDevice,
    FailSession,
    GiveUpOnDevice,
    LoadStages,
    MakePlan,
    OpenOnPipeline,
    RebindSession,
    ReviewPlan,
    UnloadStages,
)
from coordinator.events import SessionStalled
from coordinator.planning.model import Split
from coordinator.scheduling.admission import Running, Waiting, reserved_tokens
from coordinator.scheduling.assignment import Room, assign
from coordinator.state import ClusterState, Device, Pipeline, Session


@dataclass(frozen=True, slots=True)
class Limits:
    """Every patience of the coordinator, in seconds, and what it admits."""

    device_timeout_seconds: float = 5.0  # silence after which a device is lost
    probe_seconds: float = 120.0
    start_seconds: float = 3.0  # how long measuring waits for devices that were asked for by name
    load_seconds: float = 120.0  # without a sign of progress
    settle_seconds: float = 1.0  # before the first plan: others may be on their way
    gather_seconds: float = 30.0  # how long the first plan waits for devices that were asked for by name
    exclude_seconds: float = (
        15.0  # how long a device that failed is left out; twice as long each time it does again
    )
    step_seconds: float = 5.0  # how long a stage may take for a step, beyond what was measured
    idle_seconds: float = (
        5.0  # without a session before a better plan is loaded in the place of one that serves
    )
    max_faults: int = 3  # different requests that fail in one stage while it brings nobody anything
    recovery_seconds: float = 60.0  # how long a request waits for a pipeline
    max_attempts: int = 6  # of a session in a row that bring nothing
    max_running: int = 256


def decide(state: ClusterState, now: float, *, limits: Limits, split: Split) -> list[Action]:
    """The actions of the first rule that has any."""
    for rule in RULES:
        actions = rule(_Situation(state, now, limits, split))
        if actions:
            return list(actions)
    return []


@dataclass(frozen=True, slots=True)
class _Situation:
    state: ClusterState
    now: float
    limits: Limits
    split: Split


_Rule = Callable[[_Situation], Sequence[Action]]


def _drop_silent_devices(at: _Situation) -> Sequence[Action]:
    patience = at.limits.device_timeout_seconds
    return [
        DropDevice(device.device_id, device.connection, f"nothing was heard of it for {patience:g} s")
        for device in at.state.devices.values()
        if device.is_connected and at.now - device.last_seen > patience
    ]


def _give_up_on_slow_probes(at: _Situation) -> Sequence[Action]:
    return [
        GiveUpOnDevice(
            device.device_id, 0, f"it did not finish measuring itself in {at.limits.probe_seconds:g} s"
        )
        for device in at.state.devices.values()
        if device.probing_since is not None and at.now - device.probing_since > at.limits.probe_seconds
    ]


def _give_up_on_slow_loads(at: _Situation) -> Sequence[Action]:
    patience = at.limits.load_seconds
    return [
        GiveUpOnDevice(
            part.device_id, pipeline.lease, f"loading its part made no progress for {patience:g} s"
        )
        for pipeline in at.state.pipelines
        if pipeline.load_sent and not pipeline.broken
        for part in pipeline.parts
        if part.ready is None and at.now - part.moved_at > patience
    ]


def _give_up_on_stuck_stages(at: _Situation) -> Sequence[Action]:
    """A session brought nothing for longer than measured speeds explain: who makes no steps, though its heart beats?

    Where the session brought something before, it is opened again first: all stages have something to do then, and the
    first in the pipeline that does nothing is the one.
    """
    for session in at.state.open_sessions:
        pipeline = at.state.find(session.lease)
        if session.stall is None or pipeline is None or not pipeline.is_ready:
            continue
        members = [at.state.devices[member] for member in pipeline.members]
        stuck = next((d for d in members if _is_stuck(d, session.stall, at.limits)), None)
        if stuck is None:
            continue
        seconds = at.now - session.stall.since
        if session.stall.progressed:
            reason = f"nothing came for {seconds:.0f} s, and {stuck.name} makes no steps"
            return [AskSession(session.key, session.lease, reason)]
        reason = f"it made no step in {seconds:.0f} s with work waiting, though its heartbeats went on"
        return [GiveUpOnDevice(stuck.device_id, pipeline.lease, reason)]
    return []


def _is_stuck(device: Device, stall: SessionStalled, limits: Limits) -> bool:
    """It made no step since the session was opened; or, where that went on for a while, none lately.

    A heartbeat may tell late of a step made before: that is why a session that went on is opened anew before anybody
    is blamed. Who is not heard of at all is `_drop_silent_devices`' business.
    """
    if stall.progressed:
        return device.beat_at - max(device.steps_at, stall.since) >= limits.step_seconds / 2
    return device.steps_at < stall.since and device.beat_at - stall.since >= limits.step_seconds / 2


def _give_up_on_faulty_stages(at: _Situation) -> Sequence[Action]:
    """Where every request fails it is not the requests."""
    for pipeline in at.state.serving:
        for member in pipeline.members:
            faults = [fault for fault in pipeline.faults if fault.device_id == member]
            if len(faults) >= at.limits.max_faults:
                reason = f"{len(faults)} requests in a row failed there; the last one: {faults[-1].reason}"
                return [GiveUpOnDevice(member, pipeline.lease, reason)]
    return []


def _profile_newcomers(at: _Situation) -> Sequence[Action]:
    """One at a time per host: agents that measure themselves side by side on one machine measure each other."""
    if _others_start(at):
        return []
    busy = {host_of(d.data_address) for d in at.state.devices.values() if d.probing_since is not None}
    actions: list[Action] = []
    for device in sorted(at.state.devices.values(), key=lambda d: (d.joined_at, d.device_id)):
        host = host_of(device.data_address)
        if not _wants_profile(device, at) or (host and host in busy):
            continue
        busy.add(host)
        actions.append(AskProfile(device.device_id))
    return actions


def _others_start(at: _Situation) -> bool:
    """Devices that were asked for by name may be starting on a machine where others would measure themselves."""
    connected = [device for device in at.state.devices.values() if device.is_connected]
    missing = set(at.split.devices) - {device.name for device in connected}
    return bool(missing) and any(at.now - d.joined_at < at.limits.start_seconds for d in connected)


def _wants_profile(device: Device, at: _Situation) -> bool:
    return (
        device.is_connected
        and device.link is not None
        and device.profile is None
        and device.probing_since is None
        and at.now >= device.rests_until(at.limits.exclude_seconds)
    )


def host_of(address: str) -> str:
    """`tcp://10.0.0.7:4000` -> `10.0.0.7`; "" where the device can't be dialled."""
    return address.rpartition("://")[2].rpartition(":")[0] if "://" in address else ""


def _make_plan(at: _Situation) -> Sequence[Action]:
    """Where there is none or one broke; not when a spare merely joins."""
    state = at.state
    broken = next((pipeline for pipeline in state.pipelines if pipeline.broken), None)
    if state.pipelines and broken is None:
        return []
    usable = state.usable(at.now, at.limits.exclude_seconds)
    if broken is not None and len(state.pipelines) > 1:
        return [MakePlan(broken.broken, broken.lease)]  # mended, or dropped
    if not usable:
        return []
    if state.refused_revision == state.revision and not _was_forgiven_since(state.refused_at, usable, at):
        return []
    if broken is not None:
        return [MakePlan(broken.broken, broken.lease)]
    return [MakePlan("the first plan")] if _has_settled(at, usable) else []


def _was_forgiven_since(refused_at: float, usable: Sequence[Device], at: _Situation) -> bool:
    """A device that was left out when the last plan was refused may be used now."""
    return any(device.rests_until(at.limits.exclude_seconds) > refused_at for device in usable)


def _add_replica(at: _Situation) -> Sequence[Action]:
    """Once those there are serve, out of devices that stand by."""
    state, wanted = at.state, at.split.replicas
    if not state.pipelines or any(not pipeline.announced or pipeline.broken for pipeline in state.pipelines):
        return []
    if wanted and len(state.pipelines) >= wanted:
        return []
    spares = _spares(at)
    if not spares or _is_gathering(at):
        return []
    was_refused = state.replica_revision == state.revision
    return (
        []
        if was_refused and not _was_forgiven_since(state.replica_refused_at, spares, at)
        else [AddReplica()]
    )


def _review_plan(at: _Situation) -> Sequence[Action]:
    """A newcomer may make it much faster. Loading stops it for a while, so only when nobody would notice."""
    state = at.state
    if state.reviewed_revision == state.revision or state.sessions or not state.pipelines:
        return []
    if at.now - state.idle_since < at.limits.idle_seconds or not _spares(at) or _is_gathering(at):
        return []
    if any(not pipeline.announced or pipeline.broken for pipeline in state.pipelines):
        return []
    return [ReviewPlan(state.pipelines[0].lease)]


def _spares(at: _Situation) -> list[Device]:
    busy = at.state.members_of_others(0)
    usable = at.state.usable(at.now, at.limits.exclude_seconds)
    return [device for device in usable if device.device_id not in busy]


def _is_gathering(at: _Situation) -> bool:
    """Somebody is still being measured, or came just now: others may be on their way."""
    connected = [device for device in at.state.devices.values() if device.is_connected]
    if any(not device.is_measured and not device.failure for device in connected):
        return True
    return at.now - max(device.joined_at for device in connected) < at.limits.settle_seconds


def _unload_retired(at: _Situation) -> Sequence[Action]:
    return [UnloadStages(at.state.retired)] if at.state.retired else []


def _has_settled(at: _Situation, usable: Sequence[Device]) -> bool:
    connected = [device for device in at.state.devices.values() if device.is_connected]
    first = min(device.joined_at for device in connected)
    if at.now - first >= at.limits.gather_seconds:
        return True
    missing = set(at.split.devices) - {device.name for device in usable}
    if at.split.devices:
        return not missing
    enough = len(usable) >= len(at.split.ranges)
    return enough and not _is_gathering(at)


def _load_stages(at: _Situation) -> Sequence[Action]:
    return [LoadStages(p.lease) for p in at.state.pipelines if not p.broken and not p.load_sent]


def _announce(at: _Situation) -> Sequence[Action]:
    return [AnnouncePipeline(pipeline.lease) for pipeline in at.state.serving if not pipeline.announced]


def _fail_hopeless_sessions(at: _Situation) -> Sequence[Action]:
    if not at.state.sessions:
        return []
    serving = at.state.serving
    return [action for session in at.state.waiting for action in _if_hopeless(session, serving, at)]


def _if_hopeless(session: Session, serving: Sequence[Pipeline], at: _Situation) -> Sequence[Action]:
    if session.attempts >= at.limits.max_attempts:
        reason = (
            f"the pipeline gave it up {session.attempts} times in a row; the last time: {session.last_reason}"
        )
        hint = "see the coordinator's log; `edge-runtime devices` shows who is there"
        return [FailSession(session.key, reason, hint)]
    if any(_suits(session, pipeline) for pipeline in serving):
        return []
    if serving and len(serving) == len(at.state.pipelines):
        return [_unfit(session, serving)]  # nothing else is on its way
    down_since = at.state.down_since if at.state.down_since is not None else 0.0
    if at.now - max(down_since, session.since) <= at.limits.recovery_seconds:
        return []
    if serving:
        return [_unfit(session, serving)]
    cause = at.state.refusal or (at.state.pipeline.broken if at.state.pipeline else "no device is ready")
    reason = f"no pipeline could serve it for {at.limits.recovery_seconds:g} s: {cause}"
    return [FailSession(session.key, reason, "start or pair another device")]


def _suits(session: Session, pipeline: Pipeline) -> bool:
    return _is_of_class(session, pipeline) and reserved_tokens(session.rows) <= pipeline.kv_capacity_tokens


def _is_of_class(session: Session, pipeline: Pipeline) -> bool:
    return not session.class_map or session.class_map == pipeline.class_map


def _unfit(session: Session, serving: Sequence[Pipeline]) -> Action:
    """Why none of these can take it."""
    of_class = [pipeline for pipeline in serving if _is_of_class(session, pipeline)]
    if not of_class:
        live = max(serving, key=lambda pipeline: pipeline.kv_capacity_tokens)
        layer, old, new = next(
            (layer, old, new)
            for layer, (old, new) in enumerate(zip(session.class_map, live.class_map, strict=True))
            if old != new
        )
        return RebindSession(
            session.key,
            live.class_map,
            f"it began on devices of numeric class {old!r} at layer {layer}, and the device that holds this layer "
            f"now is of class {new!r}: its tokens would not be the same",
            "pair a device of the first class, or send the request again",
        )
    need_tokens = reserved_tokens(session.rows)
    most_tokens = max(pipeline.kv_capacity_tokens for pipeline in of_class)
    return FailSession(
        session.key,
        f"it needs KV memory for {need_tokens} tokens; the smallest stage of the pipeline holds {most_tokens} now",
        "shorten the prompt, lower max_tokens, or give the devices more memory",
    )


def _open_sessions(at: _Situation) -> Sequence[Action]:
    rooms = [room_of(at.state, pipeline) for pipeline in at.state.serving]
    waiting = [
        Waiting(s.key, s.tenant, s.order, s.rows, s.is_recovering, s.class_map)
        for s in at.state.waiting
        if s.not_before <= at.now
    ]
    if not rooms or not waiting:
        return []
    chosen = assign(waiting, rooms, max_running=at.limits.max_running)
    return [OpenOnPipeline(key, lease) for key, lease in chosen]


def room_of(state: ClusterState, pipeline: Pipeline) -> Room:
    running = tuple(Running(s.tenant, s.rows) for s in state.open_sessions if s.lease == pipeline.lease)
    speed = pipeline.plan.predicted_tokens_per_second
    return Room(pipeline.lease, pipeline.kv_capacity_tokens, speed, pipeline.class_map, running)


RULES: Sequence[_Rule] = (
    _drop_silent_devices,
    _give_up_on_slow_probes,
    _give_up_on_slow_loads,
    _give_up_on_stuck_stages,
    _give_up_on_faulty_stages,
    _profile_newcomers,
    _make_plan,
    _unload_retired,
    _load_stages,
    _announce,
    _add_replica,
    _review_plan,
    _fail_hopeless_sessions,
    _open_sessions,
)
