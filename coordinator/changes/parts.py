"""What several changes are made of: a part put in its place, a pipeline broken, its sessions set free."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from coordinator.state import ClusterState, Device, Pipeline, Session


def put_device(state: ClusterState, device: Device) -> ClusterState:
    return replace(state, devices=MappingProxyType({**state.devices, device.device_id: device}))


def put_session(state: ClusterState, session: Session) -> ClusterState:
    return replace(state, sessions=MappingProxyType({**state.sessions, session.key: session}))


def put_pipeline(state: ClusterState, lease: int, pipeline: Pipeline | None) -> ClusterState:
    """In the place of the one of this lease; None takes it away."""
    kept = [pipeline if each.lease == lease else each for each in state.pipelines]
    return replace(state, pipelines=tuple(each for each in kept if each is not None))


def revised(state: ClusterState) -> ClusterState:
    return replace(state, revision=state.revision + 1)


def break_if_member(state: ClusterState, device_id: str, reason: str, at: float) -> ClusterState:
    """The pipeline that lost a member is over; its sessions wait for another. Other pipelines notice nothing."""
    for pipeline in state.pipelines:
        if not pipeline.broken and device_id in pipeline.everyone:
            return break_pipeline(state, pipeline, reason, at)
    return state


def break_pipeline(state: ClusterState, pipeline: Pipeline, reason: str, at: float) -> ClusterState:
    state = put_pipeline(state, pipeline.lease, replace(pipeline, broken=reason))
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


def works(state: ClusterState, lease: int) -> ClusterState:
    """It brought somebody something: what failed before was not its fault alone."""
    pipeline = state.find(lease)
    if pipeline is None or not pipeline.faults:
        return state
    return put_pipeline(state, lease, replace(pipeline, faults=()))
