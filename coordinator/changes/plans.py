"""Plans are installed, loaded, announced, broken and dropped."""

from __future__ import annotations

from dataclasses import replace

from coordinator import events as ev
from coordinator.changes.devices import failed
from coordinator.changes.parts import break_if_member, break_pipeline, put_pipeline
from coordinator.state import ClusterState, Pipeline, StageState

MAX_FAULTS = 32  # remembered of one pipeline


def apply_plan(state: ClusterState, event: ev.Event) -> ClusterState:
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
            return put_pipeline(state, event.lease, replace(pipeline, load_sent=True))
        case ev.StageProgressed():
            return _change_stage(state, event.device_id, event.lease, moved_at=event.at)
        case ev.StageLoaded():
            return _change_stage(
                state, event.device_id, event.ready.lease, moved_at=event.at, ready=event.ready
            )
        case ev.StageBroke():
            pipeline = state.find(event.lease)
            if pipeline is None or event.device_id not in pipeline.everyone:
                return state
            name = state.devices[event.device_id].name if event.device_id in state.devices else "a device"
            state = failed(state, event.device_id, event.reason, event.at)
            return break_if_member(state, event.device_id, f"{name}: {event.reason}", event.at)
        case ev.StageFaulted():
            return _faulted(state, event)
        case ev.PipelineAnnounced():
            pipeline = state.find(event.lease)
            if pipeline is None or not pipeline.is_ready:
                return state
            return replace(
                put_pipeline(state, event.lease, replace(pipeline, announced=True)), down_since=None
            )
        case _:
            return state


def _installed(state: ClusterState, event: ev.PlanInstalled) -> ClusterState:
    stages = tuple(StageState(stage.device_id, event.at) for stage in event.plan.stages)
    holders = tuple(StageState(holder.device_id, event.at) for holder in event.plan.holders)
    pipeline = Pipeline(event.lease, event.plan, stages, holders=holders)
    old = state.find(event.replaces) if event.replaces else None
    if old is None:
        state = replace(state, pipelines=(*state.pipelines, pipeline))
    else:
        if not old.broken:
            state = break_pipeline(state, old, "a better plan takes its place", event.at)
        state = _retire(put_pipeline(state, old.lease, pipeline), old)
    state = replace(
        state,
        retired=tuple(pair for pair in state.retired if pair[0] not in pipeline.everyone),
        refusal="",
        refused_revision=-1,
        reviewed_revision=state.revision,
    )
    for member in pipeline.everyone:  # one may have left while the lease was drawn
        device = state.devices.get(member)
        if device is None or not device.is_connected:
            return break_if_member(state, member, "a member left while the plan was made", event.at)
    return state


def _dropped(state: ClusterState, event: ev.PipelineDropped) -> ClusterState:
    pipeline = state.find(event.lease)
    if pipeline is None or not pipeline.broken:
        return state
    state = _retire(put_pipeline(state, event.lease, None), pipeline)
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
        for member in old.everyone
        if member not in busy and member in state.devices and state.devices[member].is_connected
    )
    return replace(state, retired=(*state.retired, *left))


def _faulted(state: ClusterState, event: ev.StageFaulted) -> ClusterState:
    pipeline = state.find(event.lease)
    if pipeline is None or event.device_id not in pipeline.everyone:
        return state
    known = [f for f in pipeline.faults if (f.device_id, f.key) != (event.device_id, event.key)]
    return put_pipeline(state, event.lease, replace(pipeline, faults=(*known[-MAX_FAULTS:], event)))


def _change_stage(state: ClusterState, device_id: str, lease: int, **changes: object) -> ClusterState:
    pipeline = state.find(lease)
    if pipeline is None:
        return state

    def changed(parts: tuple[StageState, ...]) -> tuple[StageState, ...]:
        return tuple(
            replace(part, **changes) if part.device_id == device_id else part  # type: ignore[arg-type]
            for part in parts
        )

    after = replace(pipeline, stages=changed(pipeline.stages), holders=changed(pipeline.holders))
    return put_pipeline(state, lease, after)
