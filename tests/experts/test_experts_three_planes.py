"""Experts in three planes used from 2 or 4 bits on: each has the bits of the planes that it has."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.experts import run_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.planes import PlaneTable
from tests.experts.nested_experts import ALL_SLOTS, MODEL_8, first_planes, flip, run, upgrade_all
from tests.experts.test_expert_cache import (
    EXPERTS,
    LAYERS,
    TOP_K,
    layers_of,
    mapped,
    slots_bytes,
    some_rows,
)
from tests.support.tiny_bundle import build_tiny_bundle

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("planes") / "bundle", MODEL_8)


def start(bundle: Bundle, slots: int = ALL_SLOTS, **options: object) -> ExpertCache:
    chosen = CacheOptions(slots_bytes(bundle, slots), start_bits=2)
    return ExpertCache(layers_of(bundle), replace(chosen, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("start_bits", [2, 4])
def test_an_expert_of_three_planes_has_the_bits_of_its_first_ones_and_then_of_all(
    bundle: Bundle, start_bits: int
) -> None:
    cache = start(bundle, start_bits=start_bits)
    assert cache.is_lossy
    layers, planes = layers_of(bundle), start_bits // 2
    asked = {layer.layer: some_rows(layer, 5, layer.layer) for layer in layers}
    for layer in layers:
        wanted = run_experts(*asked[layer.layer], first_planes(bundle, layer, planes), activation="silu")
        np.testing.assert_array_equal(run(cache, layer, asked[layer.layer]), wanted)
    total = cache.statistics.total
    assert total.fewer_bits == total.misses > 0
    assert total.read_bytes == total.misses * layers[0].plane_start(planes)
    before = total.fewer_bits
    upgrade_all(cache)
    for layer in layers:
        wanted = run_experts(*asked[layer.layer], mapped(bundle, layer), activation="silu")
        np.testing.assert_array_equal(run(cache, layer, asked[layer.layer]), wanted)
    total = cache.statistics.total
    assert total.fewer_bits == before
    rest_bytes = layers[0].stride_bytes - layers[0].plane_start(planes)
    assert total.upgraded_bytes == total.misses * rest_bytes
    cache.close()


@given(
    start_bits=st.sampled_from((2, 4)),
    slots=st.integers(LAYERS * TOP_K, ALL_SLOTS),
    lanes=st.integers(1, 3),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_while_three_planes_come_every_expert_has_the_bits_of_some_of_them(
    bundle: Bundle, start_bits: int, slots: int, lanes: int, batches: list[int], seed: int
) -> None:
    """As with two: no row is a mixture, and none has fewer bits than were asked for."""
    cache = start(bundle, slots, lanes=lanes, start_bits=start_bits)
    try:
        for step, rows in enumerate(batches):
            for layer in layers_of(bundle):
                x, ids, gates = some_rows(layer, rows, seed + 100 * step + layer.layer)
                ids, gates = np.ascontiguousarray(ids[:, :1]), np.ones((rows, 1), np.float32)
                got = run(cache, layer, (x, ids, gates))
                known = [
                    run_experts(x, ids, gates, first_planes(bundle, layer, planes), activation="silu")
                    for planes in range(start_bits // 2, 4)
                ]
                assert np.any([(got == each).all(axis=1) for each in known], axis=0).all()
    finally:
        cache.close()


@pytest.mark.parametrize("start_bits", [2, 4])
@pytest.mark.parametrize("one_call", [True, False])
def test_without_upgrades_they_stay_at_the_bits_asked_for(
    bundle: Bundle, start_bits: int, one_call: bool
) -> None:
    """However a layer is run, with checks put off or not."""
    cache = start(bundle, LAYERS * TOP_K + 3, start_bits=start_bits, upgrades=False, one_call=one_call)
    for step in range(4):
        for layer in layers_of(bundle):
            asked = some_rows(layer, 1 + step, step + layer.layer)
            wanted = run_experts(*asked, first_planes(bundle, layer, start_bits // 2), activation="silu")
            got = cache.run_checked(lambda layer=layer, asked=asked: run(cache, layer, asked))  # type: ignore[misc]
            np.testing.assert_array_equal(got, wanted)
    assert cache.statistics.total.upgraded_bytes == 0
    cache.close()


def test_a_third_plane_that_can_not_be_had_leaves_the_expert_at_4_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_bundle = build_tiny_bundle(tmp_path / "bundle", MODEL_8)
    layer = layers_of(own_bundle)[LAYERS - 1]
    rows = some_rows(layer, 5, 0)
    wanted = run_experts(*rows, first_planes(own_bundle, layer, 2), activation="silu")
    for expert in range(EXPERTS):
        flip(layer, expert, plane=2)
    cache = start(own_bundle)
    run(cache, layer, rows)
    with caplog.at_level(logging.WARNING):
        upgrade_all(cache)
    np.testing.assert_array_equal(run(cache, layer, rows), wanted)
    assert "stays at fewer bits: plane 3 of expert" in caplog.text
    cache.close()


def test_second_planes_come_before_third_ones_unless_their_experts_are_hardly_used() -> None:
    table = PlaneTable(4, 3)
    for slot, (planes, uses) in enumerate([(2, 31), (1, 1), (2, 33), (3, 99)]):
        table.admitted(slot)
        table.arrived(slot, planes)
        table.used(slot, uses)
    assert table.next_upgrades(2) == [2, 1]
    table.arrived(1, 2)
    assert table.next_upgrades(4) == [0, 1]
