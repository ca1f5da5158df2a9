"""Events in, actions out: literal cases, and properties over any order of events."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import events as ev
from coordinator.decisions import Limits, decide
from coordinator.planning.model import DeviceProfile, Plan, Split, StagePlan
from coordinator.state import ClusterState, apply
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
    stages = tuple(StagePlan(d, d, LayerRange(i, i), 1, 1, 0.0, 0.0) for i, d in enumerate(devices))
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


def ask(state: ClusterState, now: float = 0.0, split: Split = AUTO) -> list[ev.Action]:
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
    assert ask(state) == [ev.AskProfile("a"), ev.AskProfile("c")]
    state = after(ev.ProfileAsked("a", 0.0), ev.ProfileAsked("c", 0.0), state=state)
    assert ask(state) == []
    state = after(ev.ProfileArrived("a", 1, profile("a"), 0.0), state=state)
    assert ask(state) == [ev.AskProfile("b")]


def test_a_silent_device_is_dropped_before_anything_else():
    state = after(*measured("a"))
    (action,) = ask(state, now=5.1)
    assert isinstance(action, ev.DropDevice)
    assert ask(after(ev.DeviceSeen("a", 1, 5.0), state=state), now=5.1) == [ev.MakePlan("the first plan")]


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
    assert ask(state, now=1.5) == [ev.MakePlan("the first plan")]


def test_the_first_plan_waits_for_named_devices_but_not_for_ever():
    state = after(*measured("a"))
    split = Split("even", (), ("a", "b"))
    late = after(ev.DeviceSeen("a", 1, 29.0), state=state)
    assert ask(late, now=29.0, split=split) == []
    late = after(ev.DeviceSeen("a", 1, 30.0), state=late)
    assert ask(late, now=30.0, split=split) == [ev.MakePlan("the first plan")]


def test_a_spare_that_joins_changes_nothing_but_is_used_where_no_plan_could_be_made():
    assert ask(after(*measured("spare"), state=serving("a", "b")), now=2.0) == []
    refused = after(*measured("a"), ev.PlanRefused("too small", 2.0))
    assert ask(refused, now=3.0) == []
    assert ask(after(*measured("b", 3.0), state=refused), now=4.0) == [ev.MakePlan("the first plan")]


def test_a_lost_member_breaks_the_plan_and_its_sessions_wait_for_the_next():
    state = after(
        ev.SessionSubmitted("s", "t", 64, ("x", "x"), 0.0), ev.SessionOpened("s", 1), state=serving("a", "b")
    )
    state = after(ev.DeviceLost("b", 1, "the link closed", 3.0), state=state)
    assert state.live is None
    assert state.sessions["s"].lease == 0
    assert ask(state, now=3.0) == [ev.MakePlan("b is gone: the link closed")]


def test_a_load_without_progress_is_given_up():
    state = after(*measured("a"), ev.PlanInstalled(1, plan("a"), 0.0))
    assert ask(state) == [ev.LoadStages(1)]
    state = after(
        ev.LoadSent(1, 0.0), ev.DeviceSeen("a", 1, 100.0), ev.StageProgressed("a", 1, 100.0), state=state
    )
    assert ask(state, now=100.0) == []
    state = after(ev.DeviceSeen("a", 1, 221.0), state=state)
    (action,) = ask(state, now=221.0)
    assert isinstance(action, ev.GiveUpOnDevice)
    state = after(ev.StageBroke("a", 1, action.reason, 221.0), state=state)
    assert ask(state, now=221.0) == []
    state = after(ev.DeviceSeen("a", 1, 231.0), state=state)
    assert ask(state, now=231.0) == [ev.MakePlan(f"a: {action.reason}")]


def test_news_of_an_old_lease_is_ignored():
    state = serving("a", "b", lease=5)
    assert after(ev.StageBroke("a", 4, "late", 1.0), ready("a", 4, 1), state=state) == state


def test_those_who_left_the_pipeline_are_told_to_unload():
    state = after(*measured("c"), state=serving("a", "b"))
    state = after(ev.StageBroke("b", 1, "broken", 1.0), ev.PlanInstalled(2, plan("a", "c"), 1.0), state=state)
    assert state.retired == (("b", 1),)
    assert after(ev.LoadSent(2, 1.0), state=state).retired == ()


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
    assert isinstance(action, ev.FailSession)
    assert "'y' at layer 0" in action.reason
    assert "'x'" in action.reason


def test_a_session_that_no_longer_fits_fails_with_both_numbers():
    (action,) = ask(after(submitted("s", rows=2000), state=serving("a", "b", kv=512)))
    assert isinstance(action, ev.FailSession)
    assert "2016" in action.reason
    assert "512" in action.reason


def test_a_session_that_breaks_again_and_again_fails_unless_it_progressed():
    state = after(submitted("s"), state=serving("a", "b"))
    for turn in range(3):
        state = after(
            ev.SessionOpened("s", 1), ev.SessionBroke("s", 1, "gap", turn == 0, turn * 10.0), state=state
        )
        assert state.sessions["s"].attempts == turn + 1
    assert isinstance(ask(state, now=4.0)[0], ev.FailSession)
    state = after(ev.SessionOpened("s", 1), ev.SessionBroke("s", 1, "gap", True, 3.0), state=state)
    assert state.sessions["s"].attempts == 1
    assert ask(state, now=3.01) == []
    assert ask(state, now=3.1) == [ev.OpenOnPipeline("s", 1)]


def test_requests_wait_for_a_pipeline_for_a_while_only():
    state = after(submitted("s"), ev.DeviceLost("a", 1, "gone", 1.0), state=serving("a"))
    assert ask(state, now=61.0) == []
    (action,) = ask(state, now=61.5)
    assert isinstance(action, ev.FailSession)
    assert "a is gone" in action.reason


# ---------------------------------------------------------------- properties

DEVICES = st.sampled_from("abc")
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
)


class Rim:
    """Carries actions out as the control loop does, with a planner that takes every usable device."""

    def __init__(self) -> None:
        self.state = ClusterState()
        self.lease = 0

    def settle(self, now: float) -> None:
        for _ in range(200):
            actions = ask(self.state, now)
            if not actions:
                return
            for action in actions:
                for event in self.carry_out(action, now):
                    self.state = apply(self.state, event)
        raise AssertionError("the rules do not come to rest")

    def carry_out(self, action: ev.Action, now: float) -> list[ev.Event]:
        match action:
            case ev.DropDevice():
                return [ev.DeviceLost(action.device_id, action.connection, action.reason, now)]
            case ev.GiveUpOnDevice():
                return [ev.DeviceFailed(action.device_id, action.reason, now)]
            case ev.AskProfile():
                return [ev.ProfileAsked(action.device_id, now)]
            case ev.MakePlan():
                self.lease += 1
                members = sorted(d.device_id for d in self.state.usable(now, LIMITS.exclude_seconds))
                return [ev.PlanInstalled(self.lease, plan(*members), now)]
            case ev.LoadStages():
                return [ev.LoadSent(action.lease, now)]
            case ev.AnnouncePipeline():
                return [ev.PipelineAnnounced(action.lease)]
            case ev.OpenOnPipeline():
                return [ev.SessionOpened(action.key, action.lease)]
            case ev.FailSession():
                return [ev.SessionEnded(action.key)]


@settings(max_examples=150)
@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_the_rules_come_to_rest_and_keep_the_invariants(events):
    rim = Rim()
    for event in events:
        rim.state = apply(rim.state, event)
        rim.settle(2.0)
        state = rim.state
        pipeline = state.pipeline
        for session in state.open_sessions:
            assert state.live is not None
            assert session.lease == state.live.lease
        if pipeline is not None and not pipeline.broken:
            assert all(state.devices[member].is_connected for member in pipeline.members)
        if state.live is not None:
            assert state.live.announced
            assert state.down_since is None
            reserved = sum(-(-s.rows // 32) * 32 for s in state.open_sessions)
            assert reserved <= state.live.kv_capacity_tokens
        else:
            assert state.down_since is not None


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
