"""What to do next: an ordered chain of small rules over the cluster's state.

The first rule that wants something wins. Whoever carries its actions out applies their events and asks again, until no
rule wants anything: so each rule may rely on those before it being satisfied.

Knows: rules, and the limits they go by. Does not know: clocks, sockets, how plans are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.events import (
    Action,
    AnnouncePipeline,
    AskProfile,
    DropDevice,
    FailSession,
    GiveUpOnDevice,
    LoadStages,
    MakePlan,
    OpenOnPipeline,
)
from coordinator.planning.model import Split
from coordinator.scheduling.admission import Running, Waiting, admit, reserved_tokens
from coordinator.state import ClusterState, Device, Pipeline, Session


@dataclass(frozen=True, slots=True)
class Limits:
    """Every patience of the coordinator, in seconds, and what it admits."""

    device_timeout_seconds: float = 5.0  # silence after which a device is lost
    probe_seconds: float = 120.0
    load_seconds: float = 120.0  # without a sign of progress
    settle_seconds: float = 1.0  # before the first plan: others may be on their way
    gather_seconds: float = 30.0  # how long the first plan waits for devices that were asked for by name
    exclude_seconds: float = 15.0  # how long a device that failed is left out
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
    pipeline = at.state.pipeline
    if pipeline is None or pipeline.broken or not pipeline.load_sent:
        return []
    patience = at.limits.load_seconds
    return [
        GiveUpOnDevice(
            stage.device_id, pipeline.lease, f"loading its layers made no progress for {patience:g} s"
        )
        for stage in pipeline.stages
        if stage.ready is None and at.now - stage.moved_at > patience
    ]


def _profile_newcomers(at: _Situation) -> Sequence[Action]:
    """One at a time per host: agents that measure themselves side by side on one machine measure each other."""
    busy = {host_of(d.data_address) for d in at.state.devices.values() if d.probing_since is not None}
    actions: list[Action] = []
    for device in sorted(at.state.devices.values(), key=lambda d: (d.joined_at, d.device_id)):
        host = host_of(device.data_address)
        if not _wants_profile(device, at) or (host and host in busy):
            continue
        busy.add(host)
        actions.append(AskProfile(device.device_id))
    return actions


def _wants_profile(device: Device, at: _Situation) -> bool:
    rests = bool(device.failure) and at.now - device.failed_at < at.limits.exclude_seconds
    return (
        device.is_connected
        and device.link is not None
        and device.profile is None
        and device.probing_since is None
        and not rests
    )


def host_of(address: str) -> str:
    """`tcp://10.0.0.7:4000` -> `10.0.0.7`; "" where the device can't be dialled."""
    return address.rpartition("://")[2].rpartition(":")[0] if "://" in address else ""


def _make_plan(at: _Situation) -> Sequence[Action]:
    """Where there is none or it broke; not when a spare merely joins."""
    state, pipeline = at.state, at.state.pipeline
    if pipeline is not None and not pipeline.broken:
        return []
    usable = state.usable(at.now, at.limits.exclude_seconds)
    if not usable:
        return []
    if state.refused_revision == state.revision and not _was_forgiven_since(state.refused_at, usable, at):
        return []
    if pipeline is not None:
        return [MakePlan(pipeline.broken)]
    return [MakePlan("the first plan")] if _has_settled(at, usable) else []


def _was_forgiven_since(refused_at: float, usable: Sequence[Device], at: _Situation) -> bool:
    """A device that was left out when the last plan was refused may be used now."""
    return any(
        device.failure and device.failed_at + at.limits.exclude_seconds > refused_at for device in usable
    )


def _has_settled(at: _Situation, usable: Sequence[Device]) -> bool:
    connected = [device for device in at.state.devices.values() if device.is_connected]
    first = min(device.joined_at for device in connected)
    if at.now - first >= at.limits.gather_seconds:
        return True
    unfinished = [d for d in connected if not d.is_measured and not d.failure]
    newest = max(device.joined_at for device in connected)
    missing = set(at.split.devices) - {device.name for device in usable}
    if at.split.devices:
        return not missing
    enough = len(usable) >= len(at.split.ranges)
    return enough and not unfinished and at.now - newest >= at.limits.settle_seconds


def _load_stages(at: _Situation) -> Sequence[Action]:
    pipeline = at.state.pipeline
    if pipeline is None or pipeline.broken or pipeline.load_sent:
        return []
    return [LoadStages(pipeline.lease)]


def _announce(at: _Situation) -> Sequence[Action]:
    live = at.state.live
    return [] if live is None or live.announced else [AnnouncePipeline(live.lease)]


def _fail_hopeless_sessions(at: _Situation) -> Sequence[Action]:
    actions: list[Action] = []
    for session in at.state.waiting:
        why = _why_hopeless(session, at)
        if why is not None:
            actions.append(FailSession(session.key, *why))
    return actions


def _why_hopeless(session: Session, at: _Situation) -> tuple[str, str] | None:
    """(sentence, hint)"""
    if session.attempts >= at.limits.max_attempts:
        reason = (
            f"the pipeline gave it up {session.attempts} times in a row; the last time: {session.last_reason}"
        )
        return reason, "see the coordinator's log; `edge-runtime devices` shows who is there"
    live = at.state.live
    if live is not None:
        return _why_unfit(session, live)
    down_since = at.state.down_since if at.state.down_since is not None else at.now
    if at.now - max(down_since, session.since) <= at.limits.recovery_seconds:
        return None
    cause = at.state.refusal or (at.state.pipeline.broken if at.state.pipeline else "no device is ready")
    return (
        f"no pipeline could serve it for {at.limits.recovery_seconds:g} s: {cause}",
        "start or pair another device",
    )


def _why_unfit(session: Session, live: Pipeline) -> tuple[str, str] | None:
    if session.class_map and session.class_map != live.class_map:
        layer, old, new = next(
            (layer, old, new)
            for layer, (old, new) in enumerate(zip(session.class_map, live.class_map, strict=True))
            if old != new
        )
        return (
            f"it began on devices of numeric class {old!r} at layer {layer}, and the device that holds this layer "
            f"now is of class {new!r}: its tokens would not be the same",
            "pair a device of the first class, or send the request again",
        )
    need_tokens = reserved_tokens(session.rows)
    if need_tokens > live.kv_capacity_tokens:
        return (
            f"it needs KV memory for {need_tokens} tokens; the smallest stage of the pipeline holds "
            f"{live.kv_capacity_tokens} now",
            "shorten the prompt, lower max_tokens, or give the devices more memory",
        )
    return None


def _open_sessions(at: _Situation) -> Sequence[Action]:
    live = at.state.live
    if live is None:
        return []
    keys = admit(
        [
            Waiting(s.key, s.tenant, s.order, s.rows, s.is_recovering)
            for s in at.state.waiting
            if s.not_before <= at.now
        ],
        [Running(s.tenant, s.rows) for s in at.state.open_sessions],
        capacity_tokens=live.kv_capacity_tokens,
        max_running=at.limits.max_running,
    )
    return [OpenOnPipeline(key, live.lease) for key in keys]


RULES: Sequence[_Rule] = (
    _drop_silent_devices,
    _give_up_on_slow_probes,
    _give_up_on_slow_loads,
    _profile_newcomers,
    _make_plan,
    _load_stages,
    _announce,
    _fail_hopeless_sessions,
    _open_sessions,
)
