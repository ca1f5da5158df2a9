"""Replicas: what holds for every set of pipelines, and when there is more than one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import improved, place, place_all, place_another
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, ModelProfile, Plan, Split
from edge_runtime.core import LayerRange
from edge_runtime.errors import PlanError

MIB = 1 << 20
WHOLE = 60 * MIB  # enough for the model alone


def device(name: str, *, memory: int = 100 * MIB, speed: float = 1e-3, **rest: object) -> DeviceProfile:
    profile = DeviceProfile("id-" + name, name, memory, speed, speed / 4, 1e-3, "class", host="host-" + name)
    return replace(profile, **rest)  # type: ignore[arg-type]


def model(layers: int = 4) -> ModelProfile:
    return ModelProfile((10 * MIB,) * layers, 4 * MIB, MIB, True, 4096, 1024, 0)


def lan(devices: Sequence[DeviceProfile], rtt: float = 1e-3) -> dict[tuple[str, str], Link]:
    return {(each.device_id, COORDINATOR): Link(rtt, 100e6) for each in devices}


def check(plans: Sequence[Plan], devices: Sequence[DeviceProfile], profile: ModelProfile) -> None:
    """Whole models on disjoint devices that have the memory; everybody else is left out with a reason."""
    by_id = {each.device_id: each for each in devices}
    used = [device_id for plan in plans for device_id in plan.devices]
    assert len(set(used)) == len(used)
    for plan in plans:
        layers = [layer for s in plan.stages for layer in range(s.layers.first, s.layers.last + 1)]
        assert layers == list(range(profile.num_layers))
        for stage in plan.stages:
            assert stage.weight_bytes <= by_id[stage.device_id].memory_free_bytes
        assert not {by_id[each].name for each in used} & set(plan.excluded)
    named = {by_id[each].name for each in used} | set(plans[0].excluded)
    assert named == {each.name for each in devices}
    assert all(plans[0].excluded.values())


PROFILES = st.lists(
    st.tuples(
        st.integers(5, 80),
        st.floats(1e-4, 1e-2),
        st.sampled_from("xy"),
        st.sampled_from(["", "h1", "h2", "h3"]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=120, deadline=None)
@given(PROFILES, st.integers(0, 4), st.sampled_from(["auto", "even"]))
def test_pipelines_are_whole_disjoint_and_fit(found, replicas, kind):
    devices = [
        device("abcde"[n], memory=memory * MIB, speed=speed, numeric_class=letter, host=host)
        for n, (memory, speed, letter, host) in enumerate(found)
    ]
    profile, links = model(), lan(devices)
    try:
        plans = place_all(devices, links, profile, Split(kind, replicas=replicas))
    except PlanError:
        with pytest.raises(PlanError):
            place(devices, links, profile, Split(kind))
        return
    check(plans, devices, profile)
    assert replicas == 0 or len(plans) <= replicas
    if replicas == 0:
        first = place(devices, links, profile, Split(kind))
        assert plans[0].stages == first.stages  # nobody pays for the others
        for one, other in itertools.combinations(plans, 2):
            hosts = [{each.host for each in devices if each.device_id in p.devices} for p in (one, other)]
            assert not hosts[0] & hosts[1]
            assert "" not in hosts[0] | hosts[1]
            assert one.class_map == other.class_map


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(5, 80), st.floats(1e-4, 1e-2)), min_size=2, max_size=4))
def test_two_replicas_are_the_best_two_there_are(found):
    devices = [device("abcd"[n], memory=m * MIB, speed=speed) for n, (m, speed) in enumerate(found)]
    profile, links = model(), lan(devices)

    def fastest(group: Sequence[DeviceProfile]) -> float:
        try:
            return place(group, links, profile, Split()).predicted_tokens_per_second if group else 0.0
        except PlanError:
            return 0.0

    best = 0.0
    for sides in itertools.product((0, 1), repeat=len(devices)):
        speeds = [fastest([d for d, s in zip(devices, sides, strict=True) if s == side]) for side in (0, 1)]
        if min(speeds) > 0:
            best = max(best, sum(speeds))
    try:
        plans = place_all(devices, links, profile, Split(replicas=2))
    except PlanError:
        assert best == 0.0
        return
    assert len(plans) == (2 if best else 1)
    if best:
        total = sum(plan.predicted_tokens_per_second for plan in plans)
        assert total == pytest.approx(best, rel=1e-9)
        assert plans[0].predicted_tokens_per_second >= plans[1].predicted_tokens_per_second


def test_devices_of_one_machine_are_no_free_replicas_but_may_be_asked_for():
    pair = [device("a", host="127.0.0.1"), device("b", host="localhost")]
    (only,) = place_all(pair, lan(pair), model(), Split())
    assert any("share a machine" in reason for reason in only.reasons)
    assert only.excluded["b"]
    both = place_all(pair, lan(pair), model(), Split(replicas=2))
    assert [plan.devices for plan in both] == [("id-a",), ("id-b",)]
    assert any("2 of 2" in reason for reason in both[1].reasons)


def test_a_slow_or_different_spare_is_no_automatic_replica():
    for spare, why in (
        (device("b", speed=10e-3), "tokens/s"),
        (device("b", numeric_class="other"), "numeric class"),
    ):
        devices = [device("a"), spare]
        (only,) = place_all(devices, lan(devices), model(), Split())
        assert any(why in reason for reason in only.reasons if "replica" in reason)


def test_a_number_that_can_not_be_had_says_why():
    devices = [device("a"), device("b", memory=20 * MIB)]
    (only,) = place_all(devices, lan(devices), model(), Split(replicas=3))
    assert any(reason.startswith("no replica:") and "bytes short" in reason for reason in only.reasons)


def test_ranges_are_repeated_on_the_next_devices():
    devices = [device(name, memory=40 * MIB) for name in "abcd"]
    split = Split("ranges", (LayerRange(0, 1), LayerRange(2, 3)), ("a", "b"), replicas=2)
    plans = place_all(devices, lan(devices), model(), split)
    assert [plan.devices for plan in plans] == [("id-a", "id-b"), ("id-c", "id-d")]


def test_another_replica_leaves_those_there_are_alone():
    devices = [device("a"), device("b"), device("c", memory=20 * MIB)]
    first = place([devices[0]], lan(devices), model(), Split())
    another = place_another([first], devices, lan(devices), model(), Split(replicas=2))
    assert another.devices == ("id-b",)
    with pytest.raises(PlanError, match="bytes short"):
        place_another([first, another], devices, lan(devices), model(), Split(replicas=3))


# ---------------------------------------------------------------- a better plan


@pytest.mark.parametrize(("speed", "is_worth_it"), [(0.5e-3, True), (0.95e-3, False)])
def test_a_newcomer_is_taken_in_where_the_gain_is_a_fifth(speed, is_worth_it):
    devices = [device("a"), device("b", speed=speed)]
    before = place(devices[:1], lan(devices), model(), Split())
    plan = improved(before, devices, lan(devices), model(), Split())
    assert (plan is not None) == is_worth_it
    if plan is not None:
        assert plan.devices == ("id-b",)
        assert "20%" in plan.reasons[0]
        assert improved(plan, devices, lan(devices), model(), Split()) is None


def test_a_split_that_was_asked_for_comes_back_when_it_can_and_is_else_left_alone():
    devices = [device("a"), device("b"), device("fast", speed=1e-5)]
    split = Split("even", devices=("a", "b"))
    asked = place(devices, lan(devices), model(), split)
    assert improved(asked, devices, lan(devices), model(), split) is None
    fallback = replace(place(devices[:1], lan(devices), model(), Split()), is_fallback=True)
    plan = improved(fallback, devices, lan(devices), model(), split)
    assert plan is not None
    assert plan.devices == ("id-a", "id-b")
