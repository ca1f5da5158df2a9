"""Experts on one device's flash and in the memory of others: who holds what, what is predicted, what is said."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.load_order import load_order
from coordinator.planning import place, replan
from coordinator.planning.help_seconds import with_flash, without_choice
from coordinator.planning.helped import place_helped
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, ModelProfile, Plan, Split
from coordinator.state import Pipeline, StageState
from edge_runtime.errors import PlanError
from edge_runtime.experts.miss_split import Line
from edge_runtime.experts.peer_shares import holders_of
from edge_runtime.protocol.messages import HOLDS_EXPERTS

MIB = 1 << 20
LAYERS, EXPERTS = 4, 8
DENSE_MIB = 8 + 4 + 1 + 1  # layers, embedding, head, KV
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
SLOW, QUICK = 5e7, 5e9  # of flash, bytes a second


def device(
    name: str, memory_mib: int, *, flash: float = 0.0, lent_mib: int = 0, numeric_class: str = "c"
) -> DeviceProfile:
    return DeviceProfile(
        name,
        name,
        memory_mib * MIB,
        1e-3,
        2e-4,
        1e-3,
        numeric_class,
        flash_bytes_per_second=flash,
        expert_cache_bytes=lent_mib * MIB,
    )


def placed(
    devices: list[DeviceProfile], *, rtt: float = 5e-4, model: ModelProfile = MODEL, kind: str = "experts"
) -> Plan:
    links = {(each.device_id, COORDINATOR): Link(rtt / 2, 1e9) for each in devices}
    names = tuple(each.name for each in devices) if kind == "experts" else ()
    return place(devices, links, model, Split(kind, devices=names))


def held_by(plan: Plan, name: str) -> list[tuple[int, int]]:
    return [(held.layer, e) for held in plan.experts if held.device_id == name for e in held.experts]


def test_a_device_with_flash_is_helped_by_memory_that_holds_only_some() -> None:
    plan = placed([device("phone", DENSE_MIB + 12, flash=SLOW), device("box", 9)])
    (stage,) = plan.stages
    assert stage.name == "phone"
    assert stage.expert_cache_bytes == 12 * MIB
    assert [holder.name for holder in plan.holders] == ["box"]
    assert len(held_by(plan, "box")) == 9
    assert not held_by(plan, "phone")  # nothing for good: its cache goes by what is used
    text = " ".join(plan.reasons)
    assert "flash alone" in text
    assert "others alone" in text


@pytest.mark.parametrize("kind", ["auto", "experts"])
@pytest.mark.parametrize(("flash", "rtt"), [(SLOW, 5e-4), (QUICK, 5e-4), (SLOW, 0.5), (QUICK, 0.5)])
def test_both_are_predicted_no_slower_than_either(kind: str, flash: float, rtt: float) -> None:
    devices = [device("phone", DENSE_MIB + 12, flash=flash), device("box", 12)]
    alone = placed(devices[:1], kind="auto").predicted_tokens_per_second
    plan = placed(devices, rtt=rtt, kind=kind)
    assert plan.predicted_tokens_per_second >= alone * (1 - 1e-9)
    if kind == "auto":
        assert bool(plan.holders) is (flash == SLOW and rtt == 5e-4)
    else:
        assert plan.holders


def test_all_in_memory_is_taken_where_that_is_faster_and_both_are_said() -> None:
    """Enough memory together, and flash so slow that a single read costs more than asking in every layer."""
    devices = [device("phone", DENSE_MIB + 16, flash=1e5, lent_mib=16), device("box", 16, lent_mib=16)]
    spread = placed(devices)
    assert len(held_by(spread, "phone")) == 16
    assert spread.stages[0].expert_cache_bytes == 0
    assert "flash alone" in spread.reasons[-1]
    quick = placed([replace(devices[0], flash_bytes_per_second=QUICK), devices[1]], rtt=2e-2)
    assert quick.stages[0].expert_cache_bytes == 16 * MIB
    assert "all experts in memory" in quick.reasons[-1]


def test_what_the_cache_will_lack_is_held_first_and_what_room_is_left_holds_the_busiest_twice() -> None:
    loads = tuple((0.3, 0.2, 0.14, 0.12, 0.1, 0.06, 0.05, 0.03) for _ in range(LAYERS))
    model = replace(MODEL, expert_loads=loads)
    phone = device("phone", DENSE_MIB + 12, flash=SLOW)
    some = placed([phone, device("box", 4)], model=model)
    assert {expert for _, expert in held_by(some, "box")} == {
        3
    }  # 0, 1 and 2 of every layer fit into the cache
    three = [phone, device("box", 20), device("desk", 20)]
    two = place_helped(three, {}, model, Split("experts", devices=("phone", "box", "desk")))
    assert two is not None
    both = [held_by(two, name) for name in ("box", "desk")]
    assert {*both[0], *both[1]} == set(product(range(LAYERS), range(EXPERTS)))
    assert all(len(set(held)) == len(held) == 20 for held in both)
    twice = {*both[0]} & {*both[1]}
    assert {expert for _, expert in twice} == {0, 1}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(8, 30))
def test_nobody_holds_more_than_fits_or_anything_twice(rooms: list[int], cache_mib: int) -> None:
    devices = [device("phone", DENSE_MIB + cache_mib, flash=SLOW)]
    devices += [device(f"h{number}", room) for number, room in enumerate(rooms)]
    try:
        plan = placed(devices)
    except PlanError:
        assert not any(rooms)
        return
    for number, room in enumerate(rooms):
        held = held_by(plan, f"h{number}")
        assert len(held) == len(set(held)) <= room


def test_only_devices_of_the_same_exact_class_help() -> None:
    phone = device("phone", DENSE_MIB + 12, flash=SLOW)
    plan = placed([phone, device("other", 99, numeric_class="d"), device("box", 9)])
    assert [holder.name for holder in plan.holders] == ["box"]
    assert "numeric class" in plan.excluded["other"]
    early = [
        replace(phone, numeric_class="c/experts:early"),
        device("box", 9, numeric_class="c/experts:early"),
    ]
    with pytest.raises(PlanError, match="experts need"):
        placed(early)


def test_a_lost_holder_leaves_flash() -> None:
    devices = [device("phone", DENSE_MIB + 12, flash=SLOW), device("box", 9), device("desk", 9)]
    links = {(each.device_id, COORDINATOR): Link(5e-4, 1e9) for each in devices}
    before = placed(devices)
    split = Split("experts", devices=("phone", "box", "desk"))
    after = replan(before, [devices[0], devices[2]], links, MODEL, split)
    assert [holder.name for holder in after.holders] == ["desk"]
    assert after.stages[0].expert_cache_bytes


def test_members_are_told_who_has_what_and_that_it_is_on_flash_too() -> None:
    devices = [device("phone", DENSE_MIB + 12, flash=SLOW), device("box", 9)]
    plan = placed(devices)
    pipeline = Pipeline(7, plan, (StageState("phone", 0.0),))
    runner, holder = (load_order(pipeline, name, "sha256:0") for name in ("phone", "box"))
    assert runner.experts_on_flash
    assert not holder.experts_on_flash
    assert holder.stage == HOLDS_EXPERTS
    found = holders_of(runner.shares, "phone", dict.fromkeys(range(LAYERS), EXPERTS))
    told = {(layer, int(e)) for layer, of in found.items() for e in of.holds[0].nonzero()[0]}
    assert told == {*held_by(plan, "box")}
    spread = placed([device("phone", DENSE_MIB + 16, lent_mib=16), device("box", 16)])
    assert not load_order(
        Pipeline(8, spread, (StageState("phone", 0.0),)), "phone", "sha256:0"
    ).experts_on_flash


lines = st.builds(Line, st.floats(0, 1), st.floats(0, 1))


@given(st.integers(0, 8), st.data(), lines, st.lists(lines, min_size=1, max_size=3).map(tuple))
def test_a_choice_is_never_slower_than_none(
    misses: int, data: st.DataObject, reading: Line, peers: tuple[Line, ...]
) -> None:
    held = data.draw(st.integers(0, misses))
    chosen = with_flash(misses, held, reading, peers)
    assert chosen <= reading.seconds(misses) + 1e-9
    assert chosen <= without_choice(misses, held, reading, peers) + 1e-9
