"""The planner against brute force, and what it promises whatever it is given."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import place, replan
from coordinator.planning.costs import Costs, Placement
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, ModelProfile, Plan, Split
from coordinator.planning.search import search
from edge_runtime.core import LayerRange
from edge_runtime.errors import PlanError

MIB = 1 << 20


def device(
    name: str, *, memory: int = 1000 * MIB, speed: float = 1e-3, head: float = 1e-3, **rest: object
) -> DeviceProfile:
    profile = DeviceProfile("id-" + name, name, memory, speed, speed / 4, head, "class")
    return replace(profile, **rest)  # type: ignore[arg-type]


def model(layers: int = 6, *, layer_bytes: int = 10 * MIB, tied: bool = True, kv: int = 0) -> ModelProfile:
    return ModelProfile((layer_bytes,) * layers, 4 * MIB, MIB, tied, 4096, 1024, kv)


def lan(*devices: DeviceProfile, rtt: float = 1e-3) -> dict[tuple[str, str], Link]:
    return {(each.device_id, COORDINATOR): Link(rtt, 100e6) for each in devices}


profiles = st.builds(
    lambda memory, speed, head: (memory, speed, head),
    st.integers(0, 60 * MIB),
    st.floats(1e-5, 1e-1),
    st.floats(0.0, 1e-2),
)


@st.composite
def problems(
    draw: st.DrawFn, max_devices: int = 4, max_layers: int = 5
) -> tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile]:
    devices = [
        device("abcdefghij"[i], memory=memory, speed=speed, head=head)
        for i, (memory, speed, head) in enumerate(draw(st.lists(profiles, min_size=1, max_size=max_devices)))
    ]
    ids = [each.device_id for each in devices] + [COORDINATOR]
    links = {
        pair: Link(rtt, speed)
        for pair in itertools.permutations(ids, 2)
        for rtt, speed in [draw(st.tuples(st.floats(0, 0.05), st.floats(1e5, 1e9)))]
        if draw(st.booleans())
    }
    weights = draw(st.lists(st.integers(0, 20 * MIB), min_size=1, max_size=max_layers))
    profile = ModelProfile(
        tuple(weights),
        draw(st.integers(0, 5 * MIB)),
        draw(st.integers(0, MIB)),
        draw(st.booleans()),
        4096,
        1024,
        draw(st.integers(0, 4096)),
    )
    return devices, links, profile


def every_placement(costs: Costs) -> list[tuple[Placement, ...]]:
    layers = costs.model.num_layers
    found = []
    for count in range(1, min(len(costs.devices), layers) + 1):
        for cuts in itertools.combinations(range(1, layers), count - 1):
            bounds = (0, *cuts, layers)
            ranges = [LayerRange(a, b - 1) for a, b in itertools.pairwise(bounds)]
            for order in itertools.permutations(range(len(costs.devices)), count):
                if all(costs.fits(d, r) for d, r in zip(order, ranges, strict=True)):
                    found.append(tuple(Placement(d, r) for d, r in zip(order, ranges, strict=True)))
    return found


def check(plan: Plan, devices: list[DeviceProfile], profile: ModelProfile) -> None:
    """What holds for every plan."""
    covered = [layer for stage in plan.stages for layer in range(stage.layers.first, stage.layers.last + 1)]
    assert covered == list(range(profile.num_layers))
    used = [stage.device_id for stage in plan.stages]
    assert len(set(used)) == len(used)
    by_id = {each.device_id: each for each in devices}
    for stage in plan.stages:
        kv = profile.kv_tokens_wanted * profile.kv_bytes_per_token_per_layer * len(stage.layers)
        assert stage.weight_bytes + kv <= by_id[stage.device_id].memory_free_bytes
        assert stage.kv_tokens >= profile.kv_tokens_wanted
    assert plan.reasons
    assert set(plan.excluded) | {stage.name for stage in plan.stages} == {each.name for each in devices}
    assert all(plan.excluded.values())
    assert plan.prefill_chunk_tokens >= 1


@settings(max_examples=120, deadline=None)
@given(problems())
def test_auto_equals_brute_force(
    problem: tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile],
) -> None:
    devices, links, profile = problem
    costs = Costs(devices, links, profile)
    options = every_placement(costs)
    if not options:
        with pytest.raises(PlanError) as caught:
            place(devices, links, profile, Split())
        assert caught.value.hint
        return
    plan = place(devices, links, profile, Split())
    check(plan, devices, profile)
    best = min(costs.seconds_per_token(option) for option in options)
    assert 1 / plan.predicted_tokens_per_second == pytest.approx(best, rel=1e-9)
    singles = [costs.seconds_per_token(option) for option in options if len(option) == 1]
    if singles:
        assert 1 / plan.predicted_tokens_per_second <= min(singles) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(max_devices=10, max_layers=12))
def test_many_devices_still_get_a_sound_plan_never_slower_than_the_best_single(
    problem: tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile],
) -> None:
    devices, links, profile = problem
    try:
        plan = place(devices, links, profile, Split())
    except PlanError:
        return
    check(plan, devices, profile)
    costs = Costs(devices, links, profile)
    for item in range(len(devices)):
        if costs.fits(item, costs.all_layers):
            assert plan.predicted_tokens_per_second >= (1 - 1e-9) / costs.compute_seconds(
                item, costs.all_layers
            )


@settings(max_examples=100, deadline=None)
@given(problems())
def test_an_even_split_is_as_equal_as_memory_allows(
    problem: tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile],
) -> None:
    devices, links, profile = problem
    costs = Costs(devices, links, profile)
    in_order = [
        option
        for option in every_placement(costs)
        if [p.device for p in option] == sorted(p.device for p in option)
    ]
    if not in_order:
        with pytest.raises(PlanError):
            place(devices, links, profile, Split("even"))
        return
    plan = place(devices, links, profile, Split("even"))
    check(plan, devices, profile)
    used = [int("abcdefghij".index(stage.name)) for stage in plan.stages]
    same = [option for option in in_order if [p.device for p in option] == used]
    least = min(sum(len(p.layers) ** 2 for p in option) for option in same)
    assert sum(len(stage.layers) ** 2 for stage in plan.stages) == least


@settings(max_examples=50, deadline=None)
@given(problems())
def test_auto_and_even_do_not_depend_on_who_joined_first(
    problem: tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile],
) -> None:
    devices, links, profile = problem
    shuffled = devices[::-1]
    for split in (Split(), Split("even")):
        try:
            expected = place(devices, links, profile, split).stages
        except PlanError:
            continue
        assert place(shuffled, links, profile, split).stages == expected


@settings(max_examples=20, deadline=None)
@given(problems(max_devices=6, max_layers=6))
def test_one_order_finds_what_all_orders_find_when_it_is_the_best_one(
    problem: tuple[list[DeviceProfile], dict[tuple[str, str], Link], ModelProfile],
) -> None:
    from coordinator.planning.search import _Table

    devices, links, profile = problem
    costs = Costs(devices, links, profile)
    found = search(costs)
    if found.pipeline is None:
        return
    best = [p.device for p in found.pipeline]
    order = best + [d for d in range(len(devices)) if d not in best]
    seconds = min(s for s, _ in _Table(costs, order, any_order=False).pipelines())
    assert seconds == pytest.approx(costs.seconds_per_token(found.pipeline), rel=1e-9)


def test_one_fast_device_beats_three_over_slow_links() -> None:
    devices = [device("laptop"), device("phone", speed=5e-3), device("mini-pc", speed=2e-3)]
    plan = place(devices, lan(*devices, rtt=20e-3), model(), Split())
    assert [stage.name for stage in plan.stages] == ["laptop"]
    assert plan.reasons[0].startswith("one device is faster: laptop alone ")
    assert plan.reasons[0].count("tokens/s") == 2
    assert set(plan.excluded) == {"phone", "mini-pc"}
    assert "slow the pipeline" in plan.excluded["phone"]


def test_a_slow_device_is_dropped_when_the_others_hold_the_model() -> None:
    devices = [device(name, memory=45 * MIB) for name in ("a", "b")] + [device("snail", speed=1.0)]
    plan = place(devices, lan(*devices), model(), Split())
    assert [stage.name for stage in plan.stages] == ["a", "b"]
    assert "without" in plan.excluded["snail"]
    assert plan.reasons[0].startswith("splitting is faster")


def test_a_model_that_fits_nowhere_alone_is_split_and_says_so() -> None:
    devices = [device(name, memory=45 * MIB) for name in ("a", "b", "c")]
    plan = place(devices, lan(*devices), model(), Split())
    assert len(plan.stages) == 2
    assert plan.reasons[0].startswith("no device holds the whole model")


def test_the_bytes_that_are_missing_are_said() -> None:
    devices = [device(name, memory=20 * MIB) for name in ("a", "b")]
    with pytest.raises(
        PlanError, match=r"65\.0 MiB .* 2 devices offer 40\.0 MiB: 26214400 bytes short"
    ) as caught:
        place(devices, lan(*devices), model(), Split())
    assert "--memory" in caught.value.hint


def test_layers_that_cannot_be_divided_are_said() -> None:
    devices = [device(name, memory=9 * MIB) for name in "abcdefgh"]
    with pytest.raises(PlanError, match="alone needs"):
        place(devices, {}, model(4), Split())


def test_no_devices_and_unknown_splits_are_refused() -> None:
    with pytest.raises(PlanError, match="no device"):
        place([], {}, model(), Split())
    with pytest.raises(PlanError, match="no split 'odd'"):
        place([device("a")], {}, model(), Split("odd"))


def test_an_even_split_over_three_devices_goes_by_name() -> None:
    devices = [device("phone"), device("mini-pc"), device("laptop")]
    plan = place(devices, lan(*devices), model(), Split("even"))
    assert [(stage.name, str(stage.layers)) for stage in plan.stages] == [
        ("laptop", "0-1"),
        ("mini-pc", "2-3"),
        ("phone", "4-5"),
    ]
    assert "laptop alone would be faster" in " ".join(plan.reasons)


def test_an_even_split_respects_memory_and_drops_who_can_hold_nothing() -> None:
    devices = [device("a", memory=16 * MIB), device("b"), device("c", memory=MIB)]
    plan = place(devices, lan(*devices), model(), Split("even"))
    assert [(stage.name, len(stage.layers)) for stage in plan.stages] == [("a", 1), ("b", 5)]
    assert plan.excluded["c"].startswith("too little memory for one layer")


def test_an_even_split_over_named_devices_leaves_the_others_as_spares() -> None:
    devices = [device("a"), device("b"), device("c"), device("d")]
    plan = place(devices, lan(*devices), model(), Split("even", devices=("c", "a", "b")))
    assert [stage.name for stage in plan.stages] == ["c", "a", "b"]
    assert plan.excluded == {"d": "spare: the split names other devices"}
    with pytest.raises(PlanError, match="names e"):
        place(devices, {}, model(), Split("even", devices=("e",)))


def ranges(*bounds: tuple[int, int]) -> Split:
    return Split("ranges", tuple(LayerRange(*bound) for bound in bounds))


def test_explicit_ranges_go_to_devices_in_joining_order_and_leave_spares() -> None:
    devices = [device("z"), device("a", memory=12 * MIB), device("m"), device("n")]
    plan = place(devices, lan(*devices), model(), ranges((0, 2), (3, 5)))
    assert [(stage.name, str(stage.layers)) for stage in plan.stages] == [("z", "0-2"), ("m", "3-5")]
    assert set(plan.excluded) == {"a", "n"}


def test_explicit_ranges_find_a_matching_when_the_first_come_is_too_greedy() -> None:
    devices = [device("big", memory=60 * MIB), device("small", memory=35 * MIB)]
    plan = place(devices, lan(*devices), model(), ranges((0, 1), (2, 5)))
    assert [stage.name for stage in plan.stages] == ["small", "big"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (ranges((0, 2), (4, 5)), "does not begin at layer 3"),
        (ranges((0, 2), (2, 5)), "does not begin at layer 3"),
        (ranges((0, 2)), "cover 3 layers, the model has 6"),
        (ranges((0, 0), (1, 1), (2, 5)), "3 ranges need as many devices; 2"),
        (replace(ranges((0, 2), (3, 5)), devices=("a", "a")), "names a device twice"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(split: Split, message: str) -> None:
    devices = [device("a"), device("b")]
    with pytest.raises(PlanError, match=message) as caught:
        place(devices, lan(*devices), model(), split)
    assert caught.value.hint


def test_a_range_too_large_for_its_device_says_by_how_much() -> None:
    devices = [device("a", memory=10 * MIB), device("b")]
    with pytest.raises(PlanError, match=r"layers 0-2 need 34\.0 MiB, a has 10\.0 MiB: 25165824 bytes short"):
        place(devices, lan(*devices), model(), replace(ranges((0, 2), (3, 5)), devices=("a", "b")))


def test_a_tied_head_brings_the_embedding_to_the_tail() -> None:
    costs = Costs([device("a")], {}, model(tied=True))
    untied = Costs([device("a")], {}, model(tied=False))
    assert costs.weight_bytes(LayerRange(5, 5)) == 15 * MIB
    assert untied.weight_bytes(LayerRange(5, 5)) == 11 * MIB
    assert costs.weight_bytes(costs.all_layers) == untied.weight_bytes(costs.all_layers) == 65 * MIB


def test_an_unmeasured_pair_goes_through_the_coordinator_and_an_unmeasured_device_is_said() -> None:
    devices = [device("a", memory=45 * MIB), device("b", memory=45 * MIB)]
    costs = Costs(
        devices, {("id-a", COORDINATOR): Link(0.010, 1e6), (COORDINATOR, "id-b"): Link(0.002, 4e6)}, model()
    )
    assert costs.link(0, 1) == Link(0.012, 1e6)
    plan = place(devices, {}, model(), Split())
    assert any("no link of a was measured" in reason for reason in plan.reasons)


def test_replan_gives_the_lost_layers_to_a_spare_of_the_same_class() -> None:
    a, b, c = device("a"), device("b"), device("c")
    spare, other = device("spare", speed=9e-3), device("other", numeric_class="another")
    before = place([a, b, c], lan(a, b, c), model(), Split("even"))
    after = replan(before, [a, c, other, spare], {}, model(), Split("even"))
    assert [stage.name for stage in after.stages] == ["a", "spare", "c"]
    assert [stage.layers for stage in after.stages] == [stage.layers for stage in before.stages]
    assert after.reasons[0] == "spare takes layers 2-3 over from b; the others keep theirs"
    check(after, [a, c, other, spare], model())


def test_replan_without_a_spare_makes_a_fresh_plan_over_the_survivors() -> None:
    a, b, c = device("a"), device("b"), device("c")
    split = Split("even", devices=("a", "b", "c"))
    before = place([a, b, c], lan(a, b, c), model(), split)
    after = replan(before, [a, c, device("x", numeric_class="another")], {}, model(), split)
    assert [(stage.name, str(stage.layers)) for stage in after.stages] == [("a", "0-2"), ("c", "3-5")]


def test_replan_of_ranges_without_a_spare_says_what_is_missing() -> None:
    a, b = device("a"), device("b")
    split = ranges((0, 2), (3, 5))
    before = place([a, b], lan(a, b), model(), split)
    with pytest.raises(PlanError, match="2 ranges need as many devices; 1"):
        replan(before, [a], {}, model(), split)


def test_prefill_chunks_shrink_with_slow_stages_and_stay_fixed_without_row_invariance() -> None:
    fast, slow = device("a", speed=1e-6), device("a", speed=40e-3)
    odd = device("a", speed=1e-6, row_invariant=False)
    chunks = [place([each], {}, model(), Split()).prefill_chunk_tokens for each in (fast, slow, odd)]
    assert chunks == [512, 32, 32]


@pytest.mark.timeout(20)
def test_eight_devices_and_eighty_layers_are_planned_in_time() -> None:
    devices = [device(f"d{i}", memory=250 * MIB, speed=1e-3 * (1 + i / 7)) for i in range(8)]
    plan = place(devices, lan(*devices), model(80), Split())
    check(plan, devices, model(80))
    assert math.isfinite(plan.predicted_prefill_tokens_per_second)


@pytest.mark.timeout(30)
def test_forty_devices_are_planned_in_time() -> None:
    devices = [device(f"d{i}", memory=60 * MIB, speed=1e-3 * (1 + i / 7)) for i in range(40)]
    plan = place(devices, lan(*devices), model(40), Split())
    check(plan, devices, model(40))
