"""Several pipelines, and devices that do not do their part: literal events in, actions out."""

from __future__ import annotations

from coordinator import actions as act
from coordinator import events as ev
from coordinator.planning.model import Split
from coordinator.state import ClusterState
from tests.support.cluster_states import after, ask, joined, measured, plan, ready, serving, submitted


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
