"""Experts spread over devices: everything is somewhere, nobody has more than fits, the busiest are near."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning import place, place_all, replan
from coordinator.planning.experts import busiest_first, expert_bytes, load
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, ModelProfile, Plan, Split
from edge_runtime.errors import PlanError

MIB = 1 << 20
LAYERS, EXPERTS = 4, 8
SPLIT = Split("experts")
MODEL = ModelProfile(
    layer_weight_bytes=(10 * MIB,) * LAYERS,
    embedding_bytes=4 * MIB,
    head_bytes=MIB,
    tied=True,
    hidden_bytes_per_row=1024,
    kv_bytes_per_token_per_layer=1024,
    kv_tokens_wanted=256,
    layer_expert_bytes=(8 * MIB,) * LAYERS,
    layer_cycle_bytes=(2 * MIB,) * LAYERS,
    layer_experts=(EXPERTS,) * LAYERS,
)
DENSE_MIB = 8 + 4 + 1 + 1  # layers, embedding, head, KV


def device(name: str, memory_mib: int, *, numeric_class: str = "c", lent_mib: int = 0) -> DeviceProfile:
    return DeviceProfile(
        name, name, memory_mib * MIB, 1e-3, 2e-4, 1e-3, numeric_class, expert_cache_bytes=lent_mib * MIB
    )


def links(devices: list[DeviceProfile], rtt_seconds: float = 1e-3) -> dict[tuple[str, str], Link]:
    return {(each.device_id, COORDINATOR): Link(rtt_seconds, 1e8) for each in devices}


def placed(devices: list[DeviceProfile], model: ModelProfile = MODEL, split: Split = SPLIT) -> Plan:
    return place(devices, links(devices), model, split)


def where(plan: Plan) -> dict[tuple[int, int], str]:
    """(layer, expert) -> device; an expert that is in two places fails the test."""
    found: dict[tuple[int, int], str] = {}
    for held in plan.experts:
        for expert in held.experts:
            assert (held.layer, expert) not in found
            found[held.layer, expert] = held.device_id
    return found


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 40))
def test_every_expert_is_held_once_and_nobody_holds_more_than_fits(
    holders: list[int], runner_room: int
) -> None:
    devices = [device("runner", DENSE_MIB + runner_room)]
    devices += [device(f"h{number}", memory) for number, memory in enumerate(holders)]
    split = Split("experts", devices=tuple(each.name for each in devices))
    try:
        plan = placed(devices, split=split)
    except PlanError:
        assert runner_room + sum(holders) < LAYERS * EXPERTS
        return
    owner = where(plan)
    assert len(owner) == LAYERS * EXPERTS
    room = {each.device_id: each.memory_free_bytes for each in devices}
    room["runner"] -= DENSE_MIB * MIB
    for name, left in room.items():
        held = [expert for expert, device_id in owner.items() if device_id == name]
        assert len(held) * MIB <= left
    assert {holder.device_id for holder in plan.holders} == set(owner.values()) - {"runner"}
    assert plan.devices == ("runner",)


def test_the_device_that_runs_the_layers_keeps_the_busiest_experts() -> None:
    loads = tuple((0.02, 0.02, 0.4, 0.02, 0.02, 0.4, 0.06, 0.06) for _ in range(LAYERS))
    model = replace(MODEL, expert_loads=loads)
    devices = [device("runner", DENSE_MIB + 2 * LAYERS), device("holder", 30)]
    owner = where(placed(devices, model, Split("experts", devices=("runner", "holder"))))
    near = {expert for expert, device_id in owner.items() if device_id == "runner"}
    assert near == {(layer, expert) for layer in range(LAYERS) for expert in (2, 5)}


def test_where_all_are_used_alike_whole_layers_are_near_so_that_few_ask() -> None:
    devices = [device("runner", DENSE_MIB + 2 * EXPERTS), device("holder", 30)]
    plan = placed(devices, split=Split("experts", devices=("runner", "holder")))
    near = {expert for expert, device_id in where(plan).items() if device_id == "runner"}
    assert len({layer for layer, _ in near}) == 2
    assert len(near) == 2 * EXPERTS


def test_the_others_have_alike_to_do() -> None:
    loads = tuple((0.3, 0.2, 0.14, 0.12, 0.1, 0.06, 0.05, 0.03) for _ in range(LAYERS))
    model = replace(MODEL, expert_loads=loads)
    devices = [device("runner", DENSE_MIB), device("x", 30), device("y", 30)]
    owner = where(placed(devices, model, Split("experts", devices=("runner", "x", "y"))))
    work = {name: sum(load(model, e) for e, who in owner.items() if who == name) for name in ("x", "y")}
    assert abs(work["x"] - work["y"]) < 0.1 * sum(work.values())


def test_a_device_of_another_numeric_class_is_asked_for_nothing() -> None:
    devices = [
        device("runner", DENSE_MIB + 10),
        device("other", 99, numeric_class="d"),
        device("holder", 30),
    ]
    plan = placed(devices, split=Split("experts", devices=("runner", "other", "holder")))
    assert [holder.name for holder in plan.holders] == ["holder"]
    assert "numeric class" in plan.excluded["other"]


def test_no_more_than_what_a_device_lends_is_taken() -> None:
    devices = [device("runner", 200, lent_mib=10), device("holder", 200, lent_mib=25)]
    owner = where(placed(devices, split=Split("experts", devices=("runner", "holder"))))
    assert list(owner.values()).count("runner") == 10


def test_where_all_experts_fit_nobody_else_is_needed() -> None:
    plan = placed([device("large", DENSE_MIB + 40), device("small", 30)])
    assert not plan.holders
    assert plan.devices == ("large",)


def test_a_slow_link_makes_the_plan_slower() -> None:
    devices = [device("runner", DENSE_MIB + 10), device("holder", 30)]
    near, far = (
        place(devices, links(devices, rtt), MODEL, SPLIT).predicted_tokens_per_second for rtt in (1e-3, 50e-3)
    )
    assert far < near / 5


def test_what_is_missing_is_said() -> None:
    with pytest.raises(PlanError, match=r"experts need 32\.0 MiB; runner has room for 10\.0 MiB .* 5\.0 MiB"):
        placed([device("runner", DENSE_MIB + 10), device("holder", 5)])
    with pytest.raises(PlanError, match="no experts"):
        placed([device("runner", 99)], replace(MODEL, layer_experts=(), layer_expert_bytes=()))


def test_a_lost_holder_means_another_spread() -> None:
    devices = [device("runner", DENSE_MIB + 10), device("x", 30), device("y", 30)]
    split = Split("experts", devices=("runner", "x", "y"))
    before = placed(devices, split=split)
    assert {holder.name for holder in before.holders} == {"x", "y"}
    after = replan(before, [devices[0], devices[2]], links(devices), MODEL, split)
    assert [holder.name for holder in after.holders] == ["y"]
    assert len(where(after)) == LAYERS * EXPERTS


def test_holders_are_in_no_other_pipeline() -> None:
    devices = [device("runner", DENSE_MIB + 10), device("holder", DENSE_MIB + 40)]
    split = Split("experts", devices=("runner", "holder"), replicas=2)
    assert len(place_all(devices, links(devices), MODEL, split)) == 1


def test_equal_experts_are_dealt_in_turn_over_the_layers() -> None:
    order = busiest_first(MODEL)
    assert [layer for layer, _ in order[:LAYERS]] == list(range(LAYERS))
    assert expert_bytes(MODEL, 0) == MIB


# ---------------------------------------------------------------- auto


def flashy(name: str, memory_mib: int, flash_bytes_per_second: float) -> DeviceProfile:
    return replace(device(name, memory_mib), flash_bytes_per_second=flash_bytes_per_second)


@pytest.mark.parametrize(("flash", "is_shared"), [(5e7, True), (5e9, False)])
def test_auto_shares_where_flash_is_slower_than_asking(flash: float, is_shared: bool) -> None:
    devices = [flashy("one", DENSE_MIB + 10, flash), flashy("two", 22, flash)]  # not enough for two stages
    fast = {(each.device_id, COORDINATOR): Link(2e-4, 1e9) for each in devices}
    plan = place(devices, fast, MODEL, Split("auto"))
    assert bool(plan.holders) is is_shared
    assert any("read from flash" in reason for reason in plan.reasons) is is_shared


def test_auto_shares_what_fits_in_no_other_way() -> None:
    model = replace(
        MODEL, layer_weight_bytes=(10 * MIB,), layer_expert_bytes=(8 * MIB,), layer_cycle_bytes=(2 * MIB,)
    )
    model = replace(model, layer_experts=(EXPERTS,))
    dense_mib = 2 + 4 + 1 + 1
    devices = [device("one", dense_mib + 4), device("two", 5)]
    plan = place(devices, links(devices), model, Split("auto"))
    assert plan.devices == ("one",)
    assert [holder.name for holder in plan.holders] == ["two"]
    assert "they are shared" in plan.reasons[0]


def test_auto_shares_nothing_where_everything_fits() -> None:
    devices = [device("one", DENSE_MIB + 40), device("two", 30)]
    assert not place(devices, links(devices), MODEL, Split("auto")).holders


def test_auto_gives_whole_layers_to_devices_with_room_for_half_of_the_experts_each() -> None:
    """A row then changes devices once a token; asking for experts would be once a layer."""
    devices = [device("one", DENSE_MIB + 18), device("two", DENSE_MIB + 18)]
    plan = place(devices, links(devices), MODEL, Split("auto"))
    assert [len(stage.layers) for stage in plan.stages] == [2, 2]
    assert not plan.holders
    asking = place(devices, links(devices), MODEL, Split("experts"))
    assert plan.predicted_tokens_per_second > asking.predicted_tokens_per_second
