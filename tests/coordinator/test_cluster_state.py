"""Events in, actions out: literal cases, and properties over any order of events."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

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


# ---------------------------------------------------------------- devices


def test_a_newcomer_is_measured_once_its_link_is_and_one_at_a_time_per_host():
    hosts = [
        joined(d, address=f"tcp://10.0.0.{host}:5{n}")
        for n, (d, host) in enumerate((("a", 1), ("b", 1), ("c", 2)))
    ]
    state = after(*hosts)
    assert ask(state) == []
    state = after(*(ev.LinkMeasured(d, 1, 1e-3, 1e8) for d in "abc"), state=state)
    assert ask(state) == [act.AskProfile("a"), act.AskProfile("c")]
    state = after(ev.ProfileAsked("a", 0.0), ev.ProfileAsked("c", 0.0), state=state)
    assert ask(state) == []
    state = after(ev.ProfileArrived("a", 1, profile("a"), 0.0), state=state)
    assert ask(state) == [act.AskProfile("b")]


def test_a_silent_device_is_dropped_before_anything_else():
    state = after(*measured("a"))
    (action,) = ask(state, now=5.1)
    assert isinstance(action, act.DropDevice)
    assert ask(after(ev.DeviceSeen("a", 1, 5.0), state=state), now=5.1) == [act.MakePlan("the first plan")]


def test_a_rejoin_with_a_new_boot_replaces_and_is_measured_again():
    state = after(*measured("a"), joined("a", 1.0, connection=2, boot="2"))
    assert list(state.devices) == ["a"]
    assert state.devices["a"].profile is None
    stale = after(ev.DeviceLost("a", 1, "late", 2.0), ev.DeviceSeen("a", 1, 99.0), state=state)
    assert stale.devices["a"].is_connected
    assert stale.devices["a"].last_seen == 1.0


def test_a_rejoin_of_the_same_process_keeps_what_was_measured():
    state = after(*measured("a"), joined("a", 1.0, connection=2))
    assert state.devices["a"].profile is not None


# ---------------------------------------------------------------- plans


def test_the_first_plan_waits_for_others_to_settle():
    state = after(*measured("a"), joined("b", 0.5))
    assert ask(state, now=1.2) == []
    state = after(*measured("b", 0.5), state=state)
    assert ask(state, now=1.2) == []
    assert ask(state, now=1.5) == [act.MakePlan("the first plan")]


def test_the_first_plan_waits_for_named_devices_but_not_for_ever():
    state = after(*measured("a"))
    split = Split("even", (), ("a", "b"))
    late = after(ev.DeviceSeen("a", 1, 29.0), state=state)
    assert ask(late, now=29.0, split=split) == []
    late = after(ev.DeviceSeen("a", 1, 30.0), state=late)
    assert ask(late, now=30.0, split=split) == [act.MakePlan("the first plan")]


def test_a_spare_that_joins_changes_nothing_but_is_used_where_no_plan_could_be_made():
    state = after(*measured("spare"), state=serving("a", "b"))
    assert ask(state, now=2.0, split=Split(replicas=1)) == []
    refused = after(*measured("a"), ev.PlanRefused("too small", 2.0))
    assert ask(refused, now=3.0) == []
    assert ask(after(*measured("b", 3.0), state=refused), now=4.0) == [act.MakePlan("the first plan")]


def test_a_lost_member_breaks_the_plan_and_its_sessions_wait_for_the_next():
    state = after(
        ev.SessionSubmitted("s", "t", 64, ("x", "x"), 0.0), ev.SessionOpened("s", 1), state=serving("a", "b")
    )
    state = after(ev.DeviceLost("b", 1, "the link closed", 3.0), state=state)
    assert state.live is None
    assert state.sessions["s"].lease == 0
    assert ask(state, now=3.0) == [act.MakePlan("b is gone: the link closed", 1)]


def test_a_load_without_progress_is_given_up():
    state = after(*measured("a"), ev.PlanInstalled(1, plan("a"), 0.0))
    assert ask(state) == [act.LoadStages(1)]
    state = after(
        ev.LoadSent(1, 0.0), ev.DeviceSeen("a", 1, 100.0), ev.StageProgressed("a", 1, 100.0), state=state
    )
    assert ask(state, now=100.0) == []
    state = after(ev.DeviceSeen("a", 1, 221.0), state=state)
    (action,) = ask(state, now=221.0)
    assert isinstance(action, act.GiveUpOnDevice)
    state = after(ev.StageBroke("a", 1, action.reason, 221.0), state=state)
    assert ask(state, now=221.0) == []
    state = after(ev.DeviceSeen("a", 1, 231.0), state=state)
    assert ask(state, now=231.0) == [act.MakePlan(f"a: {action.reason}", 1)]


def test_news_of_an_old_lease_is_ignored():
    state = serving("a", "b", lease=5)
    assert after(ev.StageBroke("a", 4, "late", 1.0), ready("a", 4, 1), state=state) == state


def test_those_who_left_the_pipeline_are_told_to_unload():
    state = after(*measured("c"), state=serving("a", "b"))
    state = after(
        ev.StageBroke("b", 1, "broken", 1.0), ev.PlanInstalled(2, plan("a", "c"), 1.0, 1), state=state
    )
    assert ask(state, now=1.0) == [act.UnloadStages((("b", 1),))]
    assert after(ev.UnloadSent((("b", 1),)), state=state).retired == ()


# ---------------------------------------------------------------- sessions


def submitted(key: str, tenant: str = "t", rows: int = 64, classes: tuple[str, ...] = ("x", "x")) -> ev.Event:
    return ev.SessionSubmitted(key, tenant, rows, classes, 0.0)


def test_sessions_are_opened_as_far_as_kv_memory_goes_tenants_in_turn():
    state = serving("a", "b", kv=192)
    state = after(submitted("s1"), submitted("s2"), submitted("s3"), submitted("u1", "u"), state=state)
    assert [action.key for action in ask(state)] == ["s1", "u1", "s2"]


def test_a_session_whose_class_is_gone_fails_in_words():
    state = after(submitted("s", classes=("y", "x")), state=serving("a", "b"))
    (action,) = ask(state)
    assert isinstance(action, act.RebindSession)
    assert action.class_map == ("x", "x")
    assert "'y' at layer 0" in action.reason
    assert "'x'" in action.reason
    assert ask(after(ev.SessionRebound("s", ("x", "x")), state=state)) == [act.OpenOnPipeline("s", 1)]


def test_a_session_that_no_longer_fits_fails_with_both_numbers():
    (action,) = ask(after(submitted("s", rows=2000), state=serving("a", "b", kv=512)))
    assert isinstance(action, act.FailSession)
    assert "2016" in action.reason
    assert "512" in action.reason


def test_a_session_that_breaks_again_and_again_fails_unless_it_progressed():
    state = after(submitted("s"), state=serving("a", "b"))
    for turn in range(3):
        state = after(
            ev.SessionOpened("s", 1), ev.SessionBroke("s", 1, "gap", turn == 0, turn * 10.0), state=state
        )
        assert state.sessions["s"].attempts == turn + 1
    assert isinstance(ask(state, now=4.0)[0], act.FailSession)
    state = after(ev.SessionOpened("s", 1), ev.SessionBroke("s", 1, "gap", True, 3.0), state=state)
    assert state.sessions["s"].attempts == 1
    assert ask(state, now=3.01) == []
    assert ask(state, now=3.1) == [act.OpenOnPipeline("s", 1)]


def test_requests_wait_for_a_pipeline_for_a_while_only():
    state = after(submitted("s"), ev.DeviceLost("a", 1, "gone", 1.0), state=serving("a"))
    assert ask(state, now=61.0) == []
    (action,) = ask(state, now=61.5)
    assert isinstance(action, act.FailSession)
    assert "a is gone" in action.reason


# ---------------------------------------------------------------- several pipelines


def replicated() -> ClusterState:
    """a and b under lease 1, c alone under lease 2."""
    state = after(*measured("c"), state=serving("a", "b"))
    return after(
        ev.PlanInstalled(2, plan("c"), 0.0),
        ev.LoadSent(2, 0.0),
        ready("c", 2),
        ev.PipelineAnnounced(2),
        state=state,
    )


TWO = Split(replicas=2)


def test_sessions_go_where_they_are_served_soonest_and_stay_there():
    state = after(submitted("s1"), submitted("s2"), state=replicated())
    opened = ask(state, split=TWO)
    assert {(action.key, action.lease) for action in opened} == {("s1", 1), ("s2", 2)}


def test_a_lost_device_ends_its_pipeline_and_no_other():
    state = after(
        *(submitted(key) for key in ("s1", "s2")),
        ev.SessionOpened("s1", 1),
        ev.SessionOpened("s2", 2),
        ev.DeviceLost("c", 1, "the link closed", 3.0),
        state=replicated(),
    )
    assert [session.lease for session in state.sessions.values()] == [1, 0]
    assert state.down_since is None
    assert ask(state, now=3.0, split=TWO) == [act.MakePlan("c is gone: the link closed", 2)]
    state = after(ev.PipelineDropped(2, "nothing is left", 3.0), state=state)
    assert [pipeline.lease for pipeline in state.pipelines] == [1]
    assert ask(state, now=3.0, split=TWO) == [act.OpenOnPipeline("s2", 1)]


def test_a_session_of_a_class_that_another_pipeline_serves_waits_for_its_own_to_be_mended():
    state = after(
        *measured("c", numeric_class="y"),
        ev.PlanInstalled(2, plan("c"), 0.0),
        ev.LoadSent(2, 0.0),
        ready("c", 2, numeric_class="y"),
        ev.PipelineAnnounced(2),
        submitted("s", classes=("y", "y")),
        state=serving("a", "b"),
    )
    assert ask(state, split=TWO) == [act.OpenOnPipeline("s", 2)]
    loading = after(
        ev.StageBroke("c", 2, "it broke", 1.0), ev.PlanInstalled(3, plan("c"), 1.0, 2), state=state
    )
    loading = after(ev.LoadSent(3, 1.0), state=loading)
    assert ask(loading, now=1.0, split=TWO) == []
    assert ask(loading, now=4.0, split=TWO) == []


def test_a_spare_becomes_a_replica_where_one_is_wanted():
    state = after(*measured("c"), state=serving("a", "b"))
    assert ask(state, now=0.5, split=TWO) == []  # others may be on their way
    assert ask(state, now=2.0, split=TWO) == [act.AddReplica()]
    refused = after(ev.ReplicaRefused("too small", 2.0), state=state)
    assert ask(refused, now=2.0, split=TWO) == []
    assert ask(after(*measured("d", 3.0), state=refused), now=4.5, split=TWO) == [act.AddReplica()]


def test_a_newcomer_makes_the_plan_be_looked_at_again_only_while_nobody_would_suffer():
    one = Split(replicas=1)
    state = after(submitted("s"), ev.SessionOpened("s", 1), *measured("c", 5.0), state=serving("a", "b"))
    seen = [ev.DeviceSeen(device, 1, 20.0) for device in "abc"]
    state = after(*seen, state=state)
    assert ask(state, now=20.0, split=one) == []
    state = after(ev.SessionEnded("s", 18.0), state=state)
    assert ask(state, now=20.0, split=one) == []  # the user may be typing
    state = after(*(ev.DeviceSeen(device, 1, 23.0) for device in "abc"), state=state)
    assert ask(state, now=23.1, split=one) == [act.ReviewPlan(1)]
    assert ask(after(ev.PlanKept(), state=state), now=23.1, split=one) == []
    better = after(ev.PlanInstalled(2, plan("c"), 23.1, 1), state=state)
    assert [pipeline.lease for pipeline in better.pipelines] == [2]
    assert set(better.retired) == {("a", 1), ("b", 1)}
    assert better.down_since == 23.1


# ---------------------------------------------------------------- devices that do not do their part


def beats(device: str, steps: int, at: float) -> list[ev.Event]:
    return [ev.DeviceSeen(device, 1, at), ev.DeviceStepped(device, 1, steps, at)]


def stuck(progressed: bool) -> ClusterState:
    """A session since 10 s; a goes on, b's heart beats and it makes no steps."""
    return after(
        submitted("s"),
        ev.SessionOpened("s", 1),
        *beats("a", 1, 5.0),
        *beats("b", 1, 5.0),
        *beats("a", 2, 11.0),
        *beats("a", 2, 16.0),
        *beats("b", 1, 16.0),
        ev.SessionStalled("s", 1, 10.0, progressed),
        state=serving("a", "b"),
    )


def test_a_stage_that_makes_no_steps_with_work_waiting_is_left_out_although_its_heart_beats():
    (action,) = ask(stuck(progressed=False), now=16.0)
    assert isinstance(action, act.GiveUpOnDevice)
    assert (action.device_id, action.lease) == ("b", 1)
    assert "heartbeats" in action.reason


def test_a_stream_that_stops_is_asked_for_again_before_anybody_is_blamed():
    (action,) = ask(stuck(progressed=True), now=16.0)
    assert isinstance(action, act.AskSession)
    assert ask(after(ev.SessionAsked("s"), state=stuck(progressed=True)), now=16.0) == []


def test_nobody_is_blamed_where_all_go_on_or_nothing_was_heard_of_them():
    going = after(*beats("b", 9, 16.0), state=stuck(progressed=False))
    assert ask(going, now=16.0) == []
    quiet = after(
        submitted("s"),
        ev.SessionOpened("s", 1),
        ev.SessionStalled("s", 1, 1.0, False),
        state=serving("a", "b"),
    )
    assert ask(quiet, now=4.0) == []


def test_where_every_request_fails_the_stage_is_left_out_and_one_bad_request_is_not_enough():
    state = serving("a", "b")
    for _ in range(6):
        state = after(ev.StageFaulted("b", 1, "s1", "not finite"), state=state)
    assert ask(state) == []
    state = after(*(ev.StageFaulted("b", 1, f"s{n}", "not finite") for n in (1, 2, 3)), state=state)
    (action,) = ask(state)
    assert isinstance(action, act.GiveUpOnDevice)
    assert action.device_id == "b"
    works = after(submitted("t"), ev.SessionOpened("t", 1), ev.SessionEnded("t", 1.0, True), state=state)
    assert ask(works) == []


def test_a_device_that_fails_again_and_again_rests_longer_each_time():
    state, rests = after(*measured("a")), []
    for at in (0.0, 100.0, 300.0):
        state = after(ev.DeviceFailed("a", "it lied", at), state=state)
        rests.append(state.devices["a"].rests_until(10.0) - at)
    assert rests == [10.0, 20.0, 40.0]
    back = after(ev.DeviceLost("a", 1, "gone", 301.0), joined("a", 302.0, connection=2), state=state)
    assert back.devices["a"].rests_until(10.0) == 340.0
    assert after(joined("a", 303.0, connection=3, boot="2"), state=back).devices["a"].failure == ""


# ---------------------------------------------------------------- properties

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
