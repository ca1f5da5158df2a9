"""Sessions wait, open, stall, break and end."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from coordinator import events as ev
from coordinator.changes.parts import put_session, works
from coordinator.state import ClusterState, Session

RETRY_FIRST_SECONDS = 0.05
RETRY_MOST_SECONDS = 2.0


def apply_session(
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
        return replace(put_session(state, new), next_order=state.next_order + 1)
    session = state.sessions.get(event.key)
    if session is None:
        return state
    match event:
        case ev.SessionEnded():
            others = {key: value for key, value in state.sessions.items() if key != event.key}
            ended = replace(state, sessions=MappingProxyType(others), idle_since=event.at)
            return works(ended, session.lease) if event.progressed else ended
        case ev.SessionOpened():
            return put_session(state, replace(session, lease=event.lease, stall=None))
        case ev.SessionStalled():
            return (
                put_session(state, replace(session, stall=event)) if session.lease == event.lease else state
            )
        case ev.SessionAsked():
            return put_session(state, replace(session, stall=None))
        case ev.SessionRebound():
            return put_session(state, replace(session, class_map=event.class_map))
        case ev.SessionBroke():
            if session.lease != event.lease:
                return state
            broke = put_session(state, _broke(session, event))
            return works(broke, session.lease) if event.progressed else broke


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
