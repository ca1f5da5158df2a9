"""Whatever happens, in any order, the rules come to rest and keep their invariants."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import actions as act
from coordinator import events as ev
from coordinator.changes.apply import apply
from coordinator.planning.model import Split
from coordinator.state import ClusterState
from tests.support.cluster_states import LIMITS, ask, joined, plan, profile, ready, submitted

DEVICES = st.sampled_from("abcd")
NUMBERS = st.integers(1, 3)
KEYS = st.sampled_from(["s1", "s2", "s3"])
EVENTS = st.one_of(
    st.builds(joined, DEVICES, st.just(0.0), NUMBERS, st.sampled_from("12")),
    st.builds(ev.LinkMeasured, DEVICES, NUMBERS, st.just(1e-3), st.just(1e8)),
    st.builds(lambda d, n: ev.ProfileArrived(d, n, profile(d), 0.0), DEVICES, NUMBERS),
    st.builds(ev.DeviceFailed, DEVICES, st.just("why"), st.just(0.0)),
    st.builds(ev.DeviceLost, DEVICES, NUMBERS, st.just("gone"), st.just(0.0)),
    st.builds(ev.DeviceRevoked, DEVICES, st.just(0.0)),
    st.builds(ready, DEVICES, st.integers(1, 6)),
    st.builds(ev.StageBroke, DEVICES, st.integers(1, 6), st.just("broke"), st.just(0.0)),
    st.builds(submitted, KEYS),
    st.builds(ev.SessionBroke, KEYS, st.integers(1, 6), st.just("gap"), st.booleans(), st.just(0.0)),
    st.builds(ev.SessionEnded, KEYS),
    st.builds(ev.DeviceStepped, DEVICES, NUMBERS, st.integers(0, 2), st.just(0.0)),
    st.builds(ev.SessionStalled, KEYS, st.integers(1, 6), st.just(-9.0), st.booleans()),
    st.builds(ev.StageFaulted, DEVICES, st.integers(1, 6), KEYS, st.just("why")),
)


class Rim:
    """Carries actions out as the control loop does, with a planner that takes two usable devices, or one."""

    def __init__(self, replicas: int = 0) -> None:
        self.state = ClusterState()
        self.lease = 0
        self.split = Split(replicas=replicas)

    def settle(self, now: float) -> None:
        for _ in range(200):
            actions = ask(self.state, now, self.split)
            if not actions:
                return
            for action in actions:
                for event in self.carry_out(action, now):
                    self.state = apply(self.state, event)
        raise AssertionError("the rules do not come to rest")

    def carry_out(self, action: act.Action, now: float) -> list[ev.Event]:
        match action:
            case act.DropDevice():
                return [ev.DeviceLost(action.device_id, action.connection, action.reason, now)]
            case act.GiveUpOnDevice():
                return [ev.DeviceFailed(action.device_id, action.reason, now)]
            case act.AskProfile():
                return [ev.ProfileAsked(action.device_id, now)]
            case act.MakePlan():
                members = self.free(action.replaces, now)
                if not members and len(self.state.pipelines) > 1:
                    return [ev.PipelineDropped(action.replaces, "nobody is left", now)]
                if not members:
                    return [ev.PlanRefused("nobody is left", now)]
                return [self.installed(members, now, action.replaces)]
            case act.AddReplica():
                members = self.free(0, now)
                return [self.installed(members, now, 0) if members else ev.ReplicaRefused("nobody", now)]
            case act.ReviewPlan():
                return [ev.PlanKept()]
            case act.UnloadStages():
                return [ev.UnloadSent(action.pairs)]
            case act.AskSession():
                lease = self.state.sessions[action.key].lease
                return [ev.SessionAsked(action.key), ev.SessionBroke(action.key, lease, "asked", True, now)]
            case act.RebindSession():
                return [ev.SessionRebound(action.key, action.class_map)]
            case act.LoadStages():
                return [ev.LoadSent(action.lease, now)]
            case act.AnnouncePipeline():
                return [ev.PipelineAnnounced(action.lease)]
            case act.OpenOnPipeline():
                return [ev.SessionOpened(action.key, action.lease)]
            case act.FailSession():
                return [ev.SessionEnded(action.key)]

    def free(self, lease: int, now: float) -> list[str]:
        busy = self.state.members_of_others(lease)
        usable = [d.device_id for d in self.state.usable(now, LIMITS.exclude_seconds)]
        return sorted(set(usable) - busy)

    def installed(self, members: list[str], now: float, replaces: int) -> ev.PlanInstalled:
        self.lease += 1
        return ev.PlanInstalled(self.lease, plan(*members), now, replaces)


def check_pipelines(state: ClusterState) -> None:
    """Disjoint devices, every session on exactly one live pipeline, and never more than its memory holds."""
    members = [member for pipeline in state.pipelines if not pipeline.broken for member in pipeline.members]
    assert len(set(members)) == len(members)
    assert len({pipeline.lease for pipeline in state.pipelines}) == len(state.pipelines)
    assert all(state.devices[member].is_connected for member in members)
    for session in state.open_sessions:
        pipeline = state.find(session.lease)
        assert pipeline is not None
        assert pipeline.is_ready
        assert session.class_map == pipeline.class_map
    for pipeline in state.serving:
        assert pipeline.announced
        reserved = sum(-(-s.rows // 32) * 32 for s in state.open_sessions if s.lease == pipeline.lease)
        assert reserved <= pipeline.kv_capacity_tokens
    assert (state.down_since is None) == bool(state.serving)


@settings(max_examples=200)
@given(st.lists(EVENTS, max_size=40), st.integers(0, 3))
def test_whatever_happens_the_rules_come_to_rest_and_keep_the_invariants(events, replicas):
    rim = Rim(replicas)
    for event in events:
        rim.state = apply(rim.state, event)
        rim.settle(2.0)
        check_pipelines(rim.state)


@settings(max_examples=100)
@given(st.lists(EVENTS, max_size=30), EVENTS)
def test_what_ends_one_pipeline_leaves_the_leases_of_the_others(events, event):
    rim = Rim(3)
    for item in events:
        rim.state = apply(rim.state, item)
        rim.settle(2.0)
    before = rim.state.serving
    rim.state = after = apply(rim.state, event)
    ended = [pipeline for pipeline in before if after.find(pipeline.lease).broken]
    assert len(ended) <= 1
    rim.settle(2.0)
    kept = {pipeline.lease: pipeline for pipeline in rim.state.serving}
    for pipeline in before:
        if pipeline not in ended and after.find(pipeline.lease) == pipeline:
            was_blamed = not rim.state.find(pipeline.lease)
            assert was_blamed or kept[pipeline.lease].stages == pipeline.stages


@given(st.lists(EVENTS, max_size=30), EVENTS)
def test_what_is_said_twice_counts_once(events, event):
    rim = Rim()
    for item in events:
        rim.state = apply(rim.state, item)
        rim.settle(2.0)
    once = apply(rim.state, event)
    twice = apply(once, event)
    ignored = {"revision": 0, "next_order": 0}
    if isinstance(event, ev.SessionSubmitted | ev.SessionBroke | ev.DeviceJoined):
        return  # a new arrival, and a number that only goes up
    assert replace(once, **ignored) == replace(twice, **ignored)
