"""Events in, actions out, in literal cases: devices, plans and sessions of one pipeline."""

from __future__ import annotations

from coordinator import actions as act
from coordinator import events as ev
from coordinator.planning.model import Split
from tests.support.cluster_states import (
    after,
    ask,
    joined,
    measured,
    plan,
    profile,
    ready,
    serving,
    submitted,
)

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


def test_nobody_measures_itself_while_devices_that_were_named_are_starting():
    named = Split(devices=("a", "b"))
    state = after(joined("a"), ev.LinkMeasured("a", 1, 1e-3, 1e8))
    assert ask(state, now=1.0, split=named) == []
    assert ask(state, now=3.0, split=named) == [act.AskProfile("a")]  # it may come in an hour
    both = after(joined("b", 1.0), state=state)
    assert ask(both, now=1.0, split=named) == [act.AskProfile("a")]


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
