"""The way in: an event, and the state after it.

Knows: which noun an event is about. Does not know: how it changes.
"""

from __future__ import annotations

from coordinator import events as ev
from coordinator.changes.devices import change_device, failed, joined, lost, on_connection, revoked, stepped
from coordinator.changes.parts import revised
from coordinator.changes.plans import apply_plan
from coordinator.changes.sessions import apply_session
from coordinator.planning.model import Link
from coordinator.state import ClusterState


def apply(state: ClusterState, event: ev.Event) -> ClusterState:
    """The state after `event`. Late, repeated and unknown things change nothing."""
    match event:
        case ev.DeviceJoined():
            return joined(state, event)
        case ev.DeviceSeen():
            return on_connection(state, event.device_id, event.connection, last_seen=event.at)
        case ev.DeviceStepped():
            return stepped(state, event)
        case ev.LinkMeasured():
            link = Link(event.rtt_seconds, event.bytes_per_second)
            return on_connection(state, event.device_id, event.connection, link=link)
        case ev.ProfileAsked():
            return change_device(state, event.device_id, probing_since=event.at)
        case ev.ProfileArrived():
            return revised(
                on_connection(
                    state,
                    event.device_id,
                    event.connection,
                    profile=event.profile,
                    probing_since=None,
                    failure="",
                )
            )
        case ev.DeviceFailed():
            return failed(state, event.device_id, event.reason, event.at)
        case ev.DeviceLost():
            return lost(state, event.device_id, event.connection, event.reason, event.at)
        case ev.DeviceRevoked():
            return revoked(state, event.device_id, event.at)
        case (
            ev.SessionSubmitted()
            | ev.SessionOpened()
            | ev.SessionStalled()
            | ev.SessionAsked()
            | ev.SessionRebound()
            | ev.SessionBroke()
            | ev.SessionEnded()
        ):
            return apply_session(state, event)
        case _:
            return apply_plan(state, event)
