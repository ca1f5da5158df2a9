"""The cache gives the bits that everything in memory gives, and nothing wrong is ever computed."""

from __future__ import annotations

import logging
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.experts import ExpertWeights, route, run_experts
from edge_kernels.flash import works
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle import hashing
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.errors import BundleError, CapacityError, EngineError, TamperedError
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_store import (
    ExpertLayer,
    expert_bytes,
    expert_layers,
    token_cycle_bytes,
)
from edge_runtime.experts.lanes import read_into
from edge_runtime.experts.policies import POLICIES
from edge_runtime.experts.reader import Cancelled
from edge_runtime.experts.reads import LaneReads
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

EXPERTS, TOP_K, LAYERS = 8, 2, 3
Rows = NDArray[np.float32]
Ids = NDArray[np.int32]


pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("experts") / "bundle", model)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Bundle:
    """For tests that damage it."""
    model = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, format="int8")
    return build_tiny_bundle(tmp_path / "bundle", model)


def layers_of(bundle: Bundle) -> tuple[ExpertLayer, ...]:
    return expert_layers(bundle, bundle.manifest.layers)


def mapped(bundle: Bundle, layer: ExpertLayer) -> ExpertWeights:
    return ExpertWeights(
        np.frombuffer(bundle.slice_bytes(layer.slice), np.uint8)[layer.first_byte :],
        layer.format,
        layer.experts,
        layer.hidden,
        layer.intermediate,
        layer.stride_bytes,
        layer.offsets,
    )


def some_rows(layer: ExpertLayer, rows: int, seed: int) -> tuple[Rows, Ids, Rows]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, layer.experts)).astype(np.float32)
    ids, gates = route(logits, top_k=layer.top_k, normalize=True, softmax_after=False)
    return rng.normal(size=(rows, layer.hidden)).astype(np.float32), ids, gates


def check_same(
    bundle: Bundle, cache: ExpertCache, batches: list[int], *, seed: int = 0, threads: int = 1
) -> None:
    """Batches of so many rows through all layers, compared with the mapped slices."""
    for step, rows in enumerate(batches):
        for layer in layers_of(bundle):
            x, ids, gates = some_rows(layer, rows, seed + 100 * step + layer.layer)
            wanted = run_experts(x, ids, gates, mapped(bundle, layer), activation="silu")
            got = cache.run(layer.layer, x, ids, gates, activation="silu", threads=threads)
            np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def slots_bytes(bundle: Bundle, slots: int) -> int:
    return slots * layers_of(bundle)[0].stride_bytes


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(LAYERS * TOP_K, LAYERS * EXPERTS + 2),
    lanes=st.integers(1, 4),
    direct=st.booleans(),
    ring=st.booleans(),
    one_call=st.booleans(),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bits_for_any_policy_budget_and_lanes(
    bundle: Bundle,
    policy: str,
    slots: int,
    lanes: int,
    direct: bool,
    ring: bool,
    one_call: bool,
    batches: list[int],
    seed: int,
) -> None:
    options = CacheOptions(
        slots_bytes(bundle, slots), policy=policy, lanes=lanes, direct=direct, ring=ring, one_call=one_call
    )
    cache = ExpertCache(layers_of(bundle), options)
    try:
        check_same(bundle, cache, batches, seed=seed, threads=1 + seed % 3)
    finally:
        cache.close()
    total = cache.statistics.total
    assert total.misses == cache.reader.counters.reads
    assert total.read_bytes == cache.reader.counters.read_bytes


@given(
    slots=st.integers(EXPERTS, LAYERS * EXPERTS + 2),  # fewer: what goes depends on what came first
    batches=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_call_decides_as_steps_do(bundle: Bundle, slots: int, batches: list[int], seed: int) -> None:
    """The same hits, the same victims: whoever runs the layers, the same experts are in the same slots."""
    if not works():
        pytest.skip("this system has no io_uring")
    found = []
    for one_call in (True, False):
        options = CacheOptions(slots_bytes(bundle, slots), one_call=one_call)
        cache = ExpertCache(layers_of(bundle), options)
        try:
            assert bool(cache._native) == (one_call and cache.kernel_reads)
            check_same(bundle, cache, batches, seed=seed, threads=1 + seed % 2)
            table = cache._pools[0].table
            by_layer = [(own.hits, own.misses, own.read_bytes) for own in cache.statistics.layers.values()]
            found.append(([table.key(slot) for slot in range(table.slots)], by_layer))
        finally:
            cache.close()
    assert found[0] == found[1]


@given(seed=st.integers(0, 1000), slots=st.integers(LAYERS * TOP_K, LAYERS * EXPERTS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bits_under_read_errors(bundle: Bundle, seed: int, slots: int) -> None:
    """Flash that fails, ends early, answers in small pieces or lies: what comes out stays the same."""
    chance, lock = random.Random(seed), threading.Lock()

    def unreliable(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        with lock:
            kind = chance.choice(("right", "right", "error", "short", "end", "flipped"))
        if kind == "error":
            raise OSError("input/output error")
        if kind == "end":
            return 0
        if kind == "short" and len(target) > 4096:
            target = target[:4096]
        count = read_into(descriptor, target, offset_bytes)
        if kind == "flipped":
            target[count // 2] ^= 1
        return count

    def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
        return bundle.read(key, offset_bytes, length_bytes)[0]

    options = CacheOptions(slots_bytes(bundle, slots), lanes=3, refetch=refetch, read=unreliable)
    cache = ExpertCache(layers_of(bundle), options)
    try:
        check_same(bundle, cache, [9, 1, 1, 3], seed=seed)
    finally:
        cache.close()
    assert cache.reader.counters.reread > 0


def test_wrong_bytes_are_named_and_never_used(own_bundle: Bundle) -> None:
    layer = layers_of(own_bundle)[1]
    flip(layer, 5)
    cache = ExpertCache(layers_of(own_bundle), CacheOptions(slots_bytes(own_bundle, LAYERS * EXPERTS)))
    x, ids, gates = some_rows(layer, 30, 0)
    with pytest.raises(TamperedError, match=r"expert 5 of layer 1 \(slice layers\.1\.experts\)"):
        cache.run(1, x, ids, gates, activation="silu", threads=1)
    without = np.where(ids == 5, (ids + 1) % EXPERTS, ids).astype(np.int32)
    got = cache.run(1, x, without, gates, activation="silu", threads=1)  # the others serve on
    assert np.isfinite(got).all()
    with pytest.raises(TamperedError):
        cache.run(1, x, ids, gates, activation="silu", threads=1)
    cache.close()


def test_what_is_damaged_is_fetched_again_and_mended(
    own_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layers_of(own_bundle)[1]
    good = layer.path.read_bytes()
    flip(layer, 5)
    asked: list[tuple[str, int, int]] = []

    def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
        asked.append((key, offset_bytes, length_bytes))
        return good[offset_bytes : offset_bytes + length_bytes]

    options = CacheOptions(slots_bytes(own_bundle, LAYERS * EXPERTS), refetch=refetch)
    cache = ExpertCache(layers_of(own_bundle), options)
    x, ids, gates = some_rows(layer, 30, 0)
    with caplog.at_level(logging.WARNING):
        got = cache.run(1, x, ids, gates, activation="silu", threads=1)
    cache.close()
    assert "expert 5 of layer 1: wrong bytes from flash" in caplog.text
    assert asked == [("layers.1.experts", layer.offset(5), layer.stride_bytes)]
    assert layer.path.read_bytes() == good
    np.testing.assert_array_equal(
        got, run_experts(x, ids, gates, mapped(own_bundle, layer), activation="silu")
    )


@pytest.mark.parametrize("sent", [b"", b"wrong"])
def test_what_is_sent_instead_is_checked_too(own_bundle: Bundle, sent: bytes) -> None:
    layer = layers_of(own_bundle)[0]
    flip(layer, 0)
    data = sent and bytes(layer.stride_bytes)
    options = CacheOptions(slots_bytes(own_bundle, LAYERS * EXPERTS), refetch=lambda *where: data)
    cache = ExpertCache(layers_of(own_bundle), options)
    x, ids, gates = some_rows(layer, 30, 0)
    with pytest.raises(TamperedError, match=r"expert 0 of layer 0 .* (instead|wrong, too)"):
        cache.run(0, x, ids, gates, activation="silu", threads=1)
    cache.close()


def test_each_expert_of_a_chunk_is_read_once(bundle: Bundle) -> None:
    cache = ExpertCache(layers_of(bundle), CacheOptions(slots_bytes(bundle, LAYERS * TOP_K), lanes=1))
    layer = layers_of(bundle)[0]
    x, ids, gates = some_rows(layer, 200, 0)
    cache.run(0, x, ids, gates, activation="silu", threads=1)
    assert cache.reader.counters.reads == len(np.unique(ids)) == EXPERTS
    assert cache.arena_bytes == slots_bytes(bundle, LAYERS * TOP_K)
    cache.close()


def test_hits_are_computed_while_misses_are_read(bundle: Bundle) -> None:
    """The read of the missing expert ends only after the hits were computed; waiting is counted from then on."""
    layer = layers_of(bundle)[0]
    x, ids, gates = some_rows(layer, 1, 0)
    held = threading.Event()
    first = True

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        if not first:
            assert held.wait(10)
        return read_into(descriptor, target, offset_bytes)

    cache = ExpertCache(layers_of(bundle), CacheOptions(slots_bytes(bundle, LAYERS * EXPERTS), read=slow))
    wanted = cache.run(0, x, ids, gates, activation="silu", threads=1)
    first = False
    other = np.array([[ids[0, 0], (ids[0].max() + 1) % EXPERTS]], np.int32)
    ticks = iter(range(100))

    def clock() -> float:
        held.set()  # asked for the time: about to wait
        return float(next(ticks))

    assert isinstance(cache._reads, LaneReads)
    cache._reads.clock = clock
    got = cache.run(0, x, other, gates, activation="silu", threads=1)
    assert got.shape == wanted.shape
    assert cache.statistics.layers[0].waited_seconds >= 1
    assert (cache.statistics.layers[0].hits, cache.statistics.layers[0].misses) == (1, 3)
    cache.close()


def test_cancelling_ends_the_batch_and_leaves_the_cache_usable(bundle: Bundle) -> None:
    layer = layers_of(bundle)[0]
    x, ids, gates = some_rows(layer, 40, 0)
    begun, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        begun.set()
        assert go_on.wait(10)
        return read_into(descriptor, target, offset_bytes)

    cache = ExpertCache(
        layers_of(bundle), CacheOptions(slots_bytes(bundle, LAYERS * EXPERTS), lanes=1, read=slow)
    )

    def cancel() -> None:
        assert begun.wait(10)
        cache.cancel()
        go_on.set()

    helper = threading.Thread(target=cancel)
    helper.start()
    with pytest.raises(Cancelled):
        cache.run(0, x, ids, gates, activation="silu", threads=1)
    helper.join()
    assert cache.reader.counters.read_bytes <= hashing.EXPERT_PIECE_BYTES  # what had not begun was not read
    check_same(bundle, cache, [5, 1])
    cache.close()


def test_too_small_a_budget_is_refused_with_both_numbers(bundle: Bundle) -> None:
    with pytest.raises(
        CapacityError, match=r"0\.\d MiB is less than the 0\.\d MiB of experts that one token"
    ):
        ExpertCache(layers_of(bundle), CacheOptions(slots_bytes(bundle, LAYERS * TOP_K) - 1))
    with pytest.raises(EngineError, match="not a cache policy"):
        ExpertCache(layers_of(bundle), CacheOptions(1 << 30, policy="best"))


def test_sizes_of_the_manifest(bundle: Bundle) -> None:
    stride = layers_of(bundle)[0].stride_bytes
    assert expert_bytes(bundle.manifest, 0, LAYERS - 1) == LAYERS * EXPERTS * stride
    assert token_cycle_bytes(bundle.manifest, 1, 2) == 2 * TOP_K * stride
    assert bundle.manifest.expert_slices(bundle.manifest.layers[1]) == ("layers.1.experts",)
    assert bundle.manifest.expert_slices(bundle.manifest.head) == ()


def test_a_store_that_is_cut_short_or_missing_is_refused(own_bundle: Bundle) -> None:
    path = layers_of(own_bundle)[2].path
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(
        BundleError, match=r"slice layers\.2\.experts has \d+ bytes on flash, the manifest says"
    ):
        layers_of(own_bundle)
    path.unlink()
    with pytest.raises(BundleError, match=r"slice layers\.2\.experts .* is missing"):
        layers_of(own_bundle)


def test_a_bundle_without_digests_of_experts_is_refused(bundle: Bundle) -> None:
    manifest = bundle.manifest
    tensors = {name: replace(tensor, expert_digests=()) for name, tensor in manifest.tensors.items()}
    old = Bundle(bundle.path, b"", b"", replace(manifest, tensors=tensors), bundle.path / "slices")
    with pytest.raises(BundleError, match="no digests of single experts"):
        layers_of(old)


def test_layers_with_experts_of_different_sizes_share_the_budget(tmp_path: Path) -> None:
    small = build_tiny_bundle(tmp_path / "small", TinyModel(layers=1, experts=4, format="int4"))
    large = build_tiny_bundle(tmp_path / "large", TinyModel(layers=2, experts=4, format="fp32"))
    first, second = layers_of(small)[0], layers_of(large)[1]
    assert first.stride_bytes < second.stride_bytes
    budget_bytes = 3 * (first.stride_bytes + second.stride_bytes)
    cache = ExpertCache((first, second), CacheOptions(budget_bytes))
    assert cache.arena_bytes <= budget_bytes
    for bundle, layer in ((small, first), (large, second), (small, first)):
        x, ids, gates = some_rows(layer, 12, 3)
        got = cache.run(layer.layer, x, ids, gates, activation="silu", threads=1)
        wanted = run_experts(x, ids, gates, mapped(bundle, layer), activation="silu")
        np.testing.assert_array_equal(got, wanted)
    cache.close()


def flip(layer: ExpertLayer, expert: int) -> None:
    with layer.path.open("r+b") as file:
        file.seek(layer.offset(expert) + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
