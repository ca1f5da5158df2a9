"""Flash is measured with what is like the product's reads: the right experts, as often, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_kernels import flash
from edge_kernels.experts import run_experts
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.flash_beside import (
    ALONE_EVERY_TOKENS,
    PROMPT,
    FlashBeside,
    exchanged,
    missed_experts,
    spread,
    stand_ins,
)
from benchmarks.memory_beside import MemoryBeside
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.experts.replay import replay
from edge_runtime.experts.trace import read_trace
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

needs_ring = pytest.mark.skipif(not flash.works(), reason="this system has no io_uring")

TRACE = read_trace(Path(__file__).parents[2] / "benchmarks" / "traces" / "qwen3_30b_a3b.csv.gz")


@pytest.mark.parametrize("policy", ["lfru", "lru"])
def test_what_is_missed_is_what_a_replay_counts(policy: str) -> None:
    missed = missed_experts(TRACE, TRACE.keys // 4, policy)
    replayed = replay(TRACE, TRACE.keys // 4, policy)
    assert sum(len(experts) for token, experts in missed.items() if token != PROMPT) == replayed.misses
    first = {layer: replayed.missed_by_access[layer] for layer in range(TRACE.layers)}
    assert [sum(at == layer for at, _ in missed[0]) for layer in range(TRACE.layers)] == list(first.values())


def test_stand_ins_are_of_the_same_layer_and_never_asked_for() -> None:
    found = stand_ins(TRACE)
    asked = {(access.layer, expert) for access in TRACE.accesses for expert in access.experts}
    assert set(found) <= asked
    assert not set(found.values()) & asked
    assert all(own[0] == other[0] for own, other in found.items())
    assert len(set(found.values())) == len(found)
    assert len(found) > len(asked) / 2


@given(seed=st.integers(1, 1 << 40))
@settings(max_examples=5, deadline=None)
def test_exchanged_experts_and_stand_ins_are_missed_alike(seed: int) -> None:
    found = exchanged(TRACE, seed)
    pairs = stand_ins(TRACE)
    allowed = {own: {own, other} for own, other in pairs.items()}
    moved = 0
    for before, after in zip(TRACE.accesses, found.accesses, strict=True):
        assert (before.step, before.layer, before.rows) == (after.step, after.layer, after.rows)
        for own, other in zip(before.experts, after.experts, strict=True):
            key = before.layer, own
            assert (before.layer, other) in allowed.get(key, {key})
            moved += own != other
    assert 0.2 < moved / sum(len(access.experts) for access in TRACE.accesses) < 0.6
    assert replay(found, TRACE.keys // 4, "lfru") == replay(TRACE, TRACE.keys // 4, "lfru")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpertCache]:
    """Of two layers, full."""
    model = TinyModel(layers=2, experts=TRACE.experts, top_k=TRACE.top_k, format="int4")
    bundle = build_tiny_bundle(tmp_path_factory.mktemp("beside") / "bundle", model)
    layers = expert_layers(bundle, bundle.manifest.layers)
    found = ExpertCache(layers, CacheOptions(sum(layer.total_bytes for layer in layers) // 4))
    for layer in layers:
        ids = np.arange(32, dtype=np.int32)[:, None]
        rows = np.ones((32, layer.hidden), np.float32)
        found.run(layer.layer, rows, ids, np.ones((32, 1), np.float32), activation="silu", threads=1)
    yield found
    found.close()


@needs_ring
def test_what_a_token_missed_has_stand_ins_in_its_layers(cache: ExpertCache) -> None:
    memory = MemoryBeside(cache, TRACE.top_k, threads=1)
    memory.choose()
    layers = list(cache.layers.values())
    slots = 2 * TRACE.experts // 4
    beside = FlashBeside(layers, TRACE, slots, "lfru", memory)
    two = replace(TRACE, accesses=tuple(access for access in TRACE.accesses if access.layer < 2))
    missed, known = missed_experts(two, slots, "lfru"), stand_ins(two)
    beside.prompt()
    rows, gates = np.ones((1, layers[0].hidden), np.float32), np.ones((1, TRACE.top_k), np.float32)
    together = []
    for token in range(ALONE_EVERY_TOKENS):
        beside.begin(token)
        before = beside.busy.read_bytes + beside.alone.read_bytes
        for layer in layers:
            assert beside.run(layer.layer, rows, gates).shape == rows.shape
        read_bytes = beside.busy.read_bytes + beside.alone.read_bytes - before
        count = sum(expert in known for expert in missed[token])
        assert read_bytes == count * layers[0].stride_bytes
        together.append(count)
    assert max(together) > 1
    assert min(beside.end_stretch()) > 0.0
    assert beside.end_stretch() == (0.0, 0.0)
    beside.close()


def test_a_token_in_memory_leaves_the_cache_as_it_is(cache: ExpertCache) -> None:
    memory = MemoryBeside(cache, TRACE.top_k, threads=1)
    for layer in cache.layers.values():
        before = [cache.pool(layer.layer).table.key(slot) for slot in range(64)]
        memory.choose()
        slots, weights = memory.some(layer.layer, TRACE.top_k)
        assert len(set(slots[0].tolist())) == TRACE.top_k
        rows, gates = np.ones((1, layer.hidden), np.float32), np.ones((1, TRACE.top_k), np.float32)
        wanted = run_experts(rows, slots, gates, weights, activation="silu")
        np.testing.assert_array_equal(memory.run(layer.layer, rows, gates), wanted)
        assert [cache.pool(layer.layer).table.key(slot) for slot in range(64)] == before


def test_the_spread_is_median_and_quartiles() -> None:
    assert spread([1e9, 2e9, 3e9]) == "2.00 (1.00 to 3.00)"
    assert spread([2e9]) == "2.00 (2.00 to 2.00)"
