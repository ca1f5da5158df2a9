"""Bit-nested experts used from their first plane on: each has the bits of the planes that it has."""

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
from edge_runtime.core import LayerRange
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.numeric_class import is_early_class, plain_class
from edge_runtime.errors import EngineError, TamperedError
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.planes import PlaneTable
from tests.experts.nested_experts import (
    ALL_SLOTS,
    MODEL,
    first_plane,
    flip,
    run,
    upgrade_all,
)
from tests.experts.test_expert_cache import (
    EXPERTS,
    LAYERS,
    TOP_K,
    check_same,
    layers_of,
    mapped,
    slots_bytes,
    some_rows,
)
from tests.support.tiny_bundle import build_tiny_bundle

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("planes") / "bundle", MODEL)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Bundle:
    """For tests that damage it."""
    return build_tiny_bundle(tmp_path / "bundle", MODEL)


def start_at_2_bits(bundle: Bundle, slots: int = ALL_SLOTS, **options: object) -> ExpertCache:
    chosen = CacheOptions(slots_bytes(bundle, slots), start_bits=2)
    return ExpertCache(layers_of(bundle), replace(chosen, **options))  # type: ignore[arg-type]


def test_4_bits_of_experts_that_have_no_more_are_all_of_them(bundle: Bundle) -> None:
    cache = start_at_2_bits(bundle, start_bits=4)
    assert not cache.is_lossy
    check_same(bundle, cache, [5, 1])
    cache.close()


def test_an_expert_used_early_has_the_bits_of_its_first_plane_and_then_of_both(bundle: Bundle) -> None:
    cache = start_at_2_bits(bundle)
    assert cache.upgrades is not None
    asked = {layer.layer: some_rows(layer, 5, layer.layer) for layer in layers_of(bundle)}
    for layer in layers_of(bundle):
        wanted = run_experts(*asked[layer.layer], first_plane(bundle, layer), activation="silu")
        np.testing.assert_array_equal(run(cache, layer, asked[layer.layer]), wanted)
    total = cache.statistics.total
    assert total.fewer_bits == total.misses > 0
    assert total.read_bytes == total.misses * layers_of(bundle)[0].plane_bytes[0]
    before = total.fewer_bits
    upgrade_all(cache)
    for layer in layers_of(bundle):
        wanted = run_experts(*asked[layer.layer], mapped(bundle, layer), activation="silu")
        np.testing.assert_array_equal(run(cache, layer, asked[layer.layer]), wanted)
    total = cache.statistics.total
    assert total.fewer_bits == before
    assert total.upgraded_bytes == total.misses * layers_of(bundle)[0].plane_bytes[1]
    cache.close()


@given(
    slots=st.integers(LAYERS * TOP_K, ALL_SLOTS),
    lanes=st.integers(1, 3),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_while_planes_come_every_expert_has_the_bits_of_some_of_its_planes(
    bundle: Bundle, slots: int, lanes: int, batches: list[int], seed: int
) -> None:
    """With one expert a row, each row is exactly what that expert gives at 2 bits or at 4: never a mixture."""
    cache = start_at_2_bits(bundle, slots, lanes=lanes)
    try:
        for step, rows in enumerate(batches):
            for layer in layers_of(bundle):
                x, ids, gates = some_rows(layer, rows, seed + 100 * step + layer.layer)
                ids, gates = np.ascontiguousarray(ids[:, :1]), np.ones((rows, 1), np.float32)
                got = run(cache, layer, (x, ids, gates))
                low = run_experts(x, ids, gates, first_plane(bundle, layer), activation="silu")
                high = run_experts(x, ids, gates, mapped(bundle, layer), activation="silu")
                assert ((got == low).all(axis=1) | (got == high).all(axis=1)).all()
    finally:
        cache.close()


def test_without_upgrades_they_stay_as_they_are(bundle: Bundle) -> None:
    cache = start_at_2_bits(bundle, upgrades=False)
    assert cache.is_lossy
    for seed in range(4):
        for layer in layers_of(bundle):
            asked = some_rows(layer, 5, seed)
            wanted = run_experts(*asked, first_plane(bundle, layer), activation="silu")
            np.testing.assert_array_equal(run(cache, layer, asked), wanted)
    assert cache.statistics.total.upgraded_bytes == 0
    cache.close()


def test_start_bits_mean_nothing_where_experts_have_no_planes(tmp_path: Path) -> None:
    plain = build_tiny_bundle(tmp_path / "plain", replace(MODEL, format="int4"))
    cache = start_at_2_bits(plain)
    assert not cache.is_lossy
    assert cache.upgrades is None
    check_same(plain, cache, [5, 1])
    cache.close()
    with pytest.raises(EngineError, match="start with 3 bits"):
        start_at_2_bits(plain, start_bits=3)


def test_a_stage_that_uses_experts_early_promises_no_bits(bundle: Bundle) -> None:
    def class_of(options: CacheOptions | None) -> str:
        stage = CpuStage.load(
            bundle, LayerRange(0, LAYERS - 1), threads=1, kv_budget_bytes=1 << 20, experts=options
        )
        stage.close()
        return stage.numeric_class

    options = CacheOptions(slots_bytes(bundle, ALL_SLOTS))
    exact, early = class_of(options), class_of(replace(options, start_bits=2))
    assert exact == class_of(None)
    assert early != exact
    assert (is_early_class(early), is_early_class(exact)) == (True, False)
    assert plain_class(early) == plain_class(exact)


@given(
    slots=st.integers(LAYERS * TOP_K, ALL_SLOTS),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_native_call_for_first_planes_gives_what_steps_give(
    bundle: Bundle, slots: int, batches: list[int], seed: int
) -> None:
    caches = [start_at_2_bits(bundle, slots, upgrades=False, one_call=one_call) for one_call in (True, False)]
    for step, rows in enumerate(batches):
        for layer in layers_of(bundle):
            asked = some_rows(layer, rows, seed + 100 * step + layer.layer)
            wanted = run_experts(*asked, first_plane(bundle, layer), activation="silu")
            for cache in caches:
                np.testing.assert_array_equal(run(cache, layer, asked), wanted)
    native, steps = (cache.statistics.total for cache in caches)
    assert replace(native, waited_seconds=0) == replace(steps, waited_seconds=0)
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("are_checks_put_off", [True, False])
def test_an_expert_whose_first_plane_is_wrong_goes_and_is_not_upgraded(
    own_bundle: Bundle, are_checks_put_off: bool
) -> None:
    layer = layers_of(own_bundle)[LAYERS - 1]
    good = layer.path.read_bytes()
    flip(layer, 5, plane=0)
    rows = some_rows(layer, 30, 0)
    cache = start_at_2_bits(own_bundle)
    assert cache.upgrades is not None
    around = cache.run_checked if are_checks_put_off else lambda work: work()
    with pytest.raises(TamperedError, match=r"plane 1 of expert 5 of layer"):
        around(lambda: run(cache, layer, rows))
    layer.path.write_bytes(good)
    for _ in range(ALL_SLOTS):
        cache.upgrades.begin()
        cache.upgrades.wait()
    got = run(cache, layer, rows)
    assert cache.statistics.layers[layer.layer].fewer_bits > 0
    cache.upgrades.wait()
    cache.upgrades.begin()
    cache.upgrades.wait()
    wanted = run_experts(*rows, mapped(own_bundle, layer), activation="silu")
    assert not np.array_equal(got, wanted)  # expert 5 at 2 bits
    np.testing.assert_array_equal(run(cache, layer, rows), wanted)
    cache.close()


def test_an_upgrade_that_can_not_be_had_leaves_the_expert_at_fewer_bits(
    own_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layers_of(own_bundle)[LAYERS - 1]
    low = first_plane(own_bundle, layer)
    whole = mapped(own_bundle, layer)
    for expert in range(EXPERTS):
        flip(layer, expert, plane=1)
    cache = start_at_2_bits(own_bundle)
    assert cache.upgrades is not None
    rows = some_rows(layer, 5, 0)
    wanted = run_experts(*rows, low, activation="silu")
    with caplog.at_level(logging.WARNING):
        for _ in range(EXPERTS):
            np.testing.assert_array_equal(run(cache, layer, rows), wanted)
            cache.upgrades.wait()
    assert "stays at fewer bits: plane 2 of expert" in caplog.text
    assert cache.statistics.total.upgraded_bytes == 0
    assert not np.array_equal(wanted, run_experts(*rows, whole, activation="silu"))
    cache.close()


@given(
    uses=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    most=st.integers(0, 12),
    complete=st.sets(st.integers(0, 11)),
)
def test_the_most_used_are_upgraded_first(uses: list[int], most: int, complete: set[int]) -> None:
    table = PlaneTable(len(uses), 2)
    for slot, rows in enumerate(uses):
        table.admitted(slot)
        table.arrived(slot, 2 if slot in complete else 1)
        table.used(slot, rows)
    chosen = table.next_upgrades(most)
    wanting = [slot for slot in range(len(uses)) if slot not in complete]
    assert chosen == sorted(wanting, key=lambda slot: -uses[slot])[:most]
    assert not set(table.next_upgrades(len(uses))) & set(chosen)
    for slot in chosen:
        table.arrived(slot, 2)
    assert not set(table.next_upgrades(len(uses))) & set(chosen)
