"""Plans count on experts that stay on flash: they make room, cost time, and are refused below one token's experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.placement import model_profile
from coordinator.planning import place
from coordinator.planning.model import DeviceProfile, ModelProfile, Split
from edge_runtime.core import LayerRange
from edge_runtime.errors import PlanError
from edge_runtime.experts.cost import (
    LayerWork,
    expected_hit_rate,
    missed_seconds,
    schedule_limit_seconds,
)
from edge_runtime.experts.flash_probe import measure_flash
from edge_runtime.experts.flash_store import expert_layers
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

MIB = 1 << 20
MODEL = ModelProfile(
    layer_weight_bytes=(100 * MIB,) * 8,
    embedding_bytes=10 * MIB,
    head_bytes=10 * MIB,
    tied=False,
    hidden_bytes_per_row=4096,
    kv_bytes_per_token_per_layer=1024,
    kv_tokens_wanted=1024,
    layer_expert_bytes=(90 * MIB,) * 8,
    layer_cycle_bytes=(6 * MIB,) * 8,
)
ALL = LayerRange(0, 7)


def device(memory_bytes: int, flash: float = 1e9, cache_bytes: int = 0, name: str = "phone") -> DeviceProfile:
    return DeviceProfile(
        name,
        name,
        memory_bytes,
        1e-3,
        1e-4,
        1e-3,
        "class",
        flash_bytes_per_second=flash,
        expert_cache_bytes=cache_bytes,
    )


def test_experts_on_flash_make_room_and_cost_time() -> None:
    in_memory = place([device(1000 * MIB)], {}, MODEL, Split())
    on_flash = place([device(400 * MIB)], {}, MODEL, Split())
    assert [stage.layers for stage in on_flash.stages] == [ALL]
    stage = on_flash.stages[0]
    assert 0 < stage.expert_cache_bytes < 720 * MIB
    assert stage.kv_tokens >= MODEL.kv_tokens_wanted
    assert stage.flash_seconds > 0
    assert on_flash.predicted_tokens_per_second < in_memory.predicted_tokens_per_second
    assert any("experts on flash behind a cache" in reason for reason in on_flash.reasons)
    slower = place([device(400 * MIB, flash=1e8)], {}, MODEL, Split())
    assert slower.predicted_tokens_per_second < on_flash.predicted_tokens_per_second


def test_a_fixed_cache_is_kept_to() -> None:
    plan = place([device(2000 * MIB, cache_bytes=100 * MIB)], {}, MODEL, Split())
    assert plan.stages[0].expert_cache_bytes == 100 * MIB
    assert plan.stages[0].kv_tokens > place([device(1000 * MIB)], {}, MODEL, Split()).stages[0].kv_tokens


@pytest.mark.parametrize(
    "small",
    [device(400 * MIB, flash=0.0), device(150 * MIB), device(2000 * MIB, cache_bytes=40 * MIB)],
)
def test_what_can_not_work_is_refused(small: DeviceProfile) -> None:
    with pytest.raises(PlanError):
        place([small], {}, MODEL, Split("ranges", (ALL,), ("phone",)))


def test_a_device_with_memory_is_preferred() -> None:
    plan = place([device(400 * MIB), device(1200 * MIB, name="box")], {}, MODEL, Split())
    assert [stage.name for stage in plan.stages] == ["box"]
    even = place([device(400 * MIB), device(300 * MIB, name="box")], {}, MODEL, Split("even"))
    assert len(even.stages) == 2


def test_the_profile_of_a_model_knows_its_experts(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "bundle", TinyModel(layers=2, experts=8, top_k=2, format="int8"))
    profile = model_profile(bundle.manifest, 64)
    stride = expert_layers(bundle, bundle.manifest.layers)[0].stride_bytes
    assert profile.layer_expert_bytes == (8 * stride,) * 2
    assert profile.layer_cycle_bytes == (2 * stride,) * 2
    dense = build_tiny_bundle(tmp_path / "dense", TinyModel(layers=2))
    assert model_profile(dense.manifest, 64).layer_expert_bytes == (0, 0)
    assert replace(MODEL, layer_expert_bytes=()) != MODEL
    speed = measure_flash(expert_layers(bundle, bundle.manifest.layers), budget_seconds=0.03)
    assert speed.bytes_per_second > 0
    assert speed.lanes in (1, 2, 4)


def test_hit_rates_grow_with_the_cache() -> None:
    rates = [expected_hit_rate(share / 100) for share in range(-5, 110)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)
    assert missed_seconds(1000, 0.75, 500.0) == pytest.approx(0.5)


def test_the_limit_of_a_schedule() -> None:
    """Reads hide behind hits, and hits behind reads; what arrives last is computed after both."""
    bound_by_flash = LayerWork(1.0, 2.0, 0.5, missed_bytes=30)
    bound_by_hits = LayerWork(1.0, 2.0, 0.5, missed_bytes=10)
    without = LayerWork(1.0, 2.0, 0.0, missed_bytes=0)
    assert schedule_limit_seconds([bound_by_flash], 10.0) == pytest.approx(4.5)
    assert schedule_limit_seconds([bound_by_hits], 10.0) == pytest.approx(3.5)
    assert schedule_limit_seconds([without, bound_by_hits], 10.0) == pytest.approx(6.5)
