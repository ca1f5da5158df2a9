"""A plan says what rows are between layers, what a token costs on a link, and what that is worth."""

from __future__ import annotations

import pytest

from coordinator.placement import model_profile
from coordinator.planning import place
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, Plan, Split
from edge_runtime.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import StageFormats
from edge_runtime.sdk.cluster import demo_bundle

HALVES = Split("ranges", (LayerRange(0, 2), LayerRange(3, 5)))


def plan(wire: str, split: Split = HALVES) -> Plan:
    devices = [DeviceProfile(name, name, 1 << 30, 1e-4, 1e-5, 1e-4, "class") for name in ("a", "b")]
    links = {(name, COORDINATOR): Link(1e-3, 1e5) for name in ("a", "b")}
    manifest = Bundle.open(demo_bundle()).manifest
    return place(devices, links, model_profile(manifest, 64, StageFormats(wire=wire)), split)


def test_hops_cost_the_bytes_that_really_travel() -> None:
    hidden = Bundle.open(demo_bundle()).manifest.model.hidden_size
    seconds = {wire: plan(wire).stages[0].hop_seconds for wire in ("fp32", "fp16", "int8")}
    assert seconds["fp32"] - seconds["fp16"] == pytest.approx(2 * hidden / 1e5)
    assert seconds["fp32"] - seconds["int8"] == pytest.approx((3 * hidden - 4) / 1e5)


def test_the_reasons_say_which_and_how_much() -> None:
    hidden = Bundle.open(demo_bundle()).manifest.model.hidden_size
    said = {wire: "\n".join(plan(wire).reasons) for wire in ("fp32", "fp16", "int8")}
    assert f"full precision (fp32), {4 * hidden:,} bytes a token and hop" in said["fp32"]
    assert (
        f"rounded to fp16 after every layer, cut or not, {2 * hidden:,} bytes a token and hop" in said["fp16"]
    )
    assert f"{hidden + 4:,} bytes a token and hop" in said["int8"]
    assert "approximate" in said["int8"]
    assert "approximate" not in said["fp16"]


def test_keys_and_values_in_bytes_leave_room_for_more_tokens() -> None:
    manifest = Bundle.open(demo_bundle()).manifest
    plain, codes = (model_profile(manifest, 64, StageFormats(kv=kv)) for kv in ("fp32", "int8"))
    ratio = plain.kv_bytes_per_token_per_layer / codes.kv_bytes_per_token_per_layer
    assert 3 < ratio < 4
    devices = [DeviceProfile("a", "a", 1 << 28, 1e-4, 1e-5, 1e-4, "class")]
    found = place(devices, {}, codes, Split())
    assert found.stages[0].kv_tokens > 3 * place(devices, {}, plain, Split()).stages[0].kv_tokens
    assert any("keys and values in int8" in reason for reason in found.reasons)


def test_one_device_rounds_as_well() -> None:
    alone = plan("fp16", Split("ranges", (LayerRange(0, 5),)))
    assert alone.formats == StageFormats(wire="fp16")
    assert any("rounded to fp16" in reason for reason in alone.reasons)
    assert not any("fp32" in reason for reason in plan("fp32", Split("ranges", (LayerRange(0, 5),))).reasons)
