"""Bit-nested experts: whole ones compute the same bits always."""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.experts import run_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.checks import check_manifest
from edge_runtime.errors import BundleError, TamperedError
from edge_runtime.experts import reader
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.lanes import read_into
from edge_runtime.experts.peer_store import PeerStore
from edge_runtime.experts.policies import POLICIES
from tests.experts.nested_experts import ALL_SLOTS, MODEL, MODEL_8, data_of, flip, run
from tests.experts.test_expert_cache import (
    LAYERS,
    TOP_K,
    check_same,
    layers_of,
    mapped,
    slots_bytes,
    some_rows,
)
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture(scope="module", params=[MODEL, MODEL_8], ids=["nested4", "nested8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("planes") / "bundle", request.param)


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(LAYERS * TOP_K, ALL_SLOTS),
    lanes=st.integers(1, 4),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 50),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_experts_give_the_same_bits_always(
    bundle: Bundle, policy: str, slots: int, lanes: int, batches: list[int], seed: int
) -> None:
    cache = ExpertCache(
        layers_of(bundle), CacheOptions(slots_bytes(bundle, slots), policy=policy, lanes=lanes)
    )
    try:
        assert not cache.is_lossy
        check_same(bundle, cache, batches, seed=seed, threads=1 + seed % 3)
    finally:
        cache.close()
    total = cache.statistics.total
    assert cache.reader.counters.reads == layers_of(bundle)[0].planes * total.misses
    assert cache.reader.counters.read_bytes == total.read_bytes
    assert (total.fewer_bits, total.upgraded_bytes) == (0, 0)


@given(seed=st.integers(0, 1000), slots=st.integers(LAYERS * TOP_K, ALL_SLOTS))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bits_under_read_errors(bundle: Bundle, seed: int, slots: int) -> None:
    chance, lock = random.Random(seed), threading.Lock()

    def unreliable(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        with lock:
            kind = chance.choice(("right", "right", "error", "end", "flipped"))
        if kind == "error":
            raise OSError("input/output error")
        if kind == "end":
            return 0
        count = read_into(descriptor, target, offset_bytes)
        if kind == "flipped":
            target[count // 2] ^= 1
        return count

    options = CacheOptions(
        slots_bytes(bundle, slots),
        lanes=3,
        refetch=lambda key, offset, length: bundle.read(key, offset, length)[0],
        read=unreliable,
    )
    cache = ExpertCache(layers_of(bundle), options)
    try:
        check_same(bundle, cache, [9, 1, 1, 3], seed=seed)
    finally:
        cache.close()
    assert cache.reader.counters.reread > 0


@pytest.mark.parametrize(("model", "plane"), [(MODEL, 0), (MODEL, 1), (MODEL_8, 1), (MODEL_8, 2)])
def test_a_flipped_bit_is_named_with_its_plane_and_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: TinyModel, plane: int
) -> None:
    own_bundle = build_tiny_bundle(tmp_path / "bundle", model)
    layer = layers_of(own_bundle)[1]
    good = layer.path.read_bytes()
    flip(layer, 5, plane)
    asked: list[tuple[str, int, int]] = []

    def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
        asked.append((key, offset_bytes, length_bytes))
        return good[offset_bytes : offset_bytes + length_bytes]

    options = CacheOptions(slots_bytes(own_bundle, ALL_SLOTS))
    rows = some_rows(layer, 30, 0)
    cache = ExpertCache(layers_of(own_bundle), options)
    name = rf"plane {plane + 1} of expert 5 of layer 1 \(slice layers\.1\.experts\)"
    with pytest.raises(TamperedError, match=name):
        run(cache, layer, rows)
    cache.close()
    cache = ExpertCache(layers_of(own_bundle), replace(options, refetch=refetch))
    with caplog.at_level(logging.WARNING):
        got = run(cache, layer, rows)
    cache.close()
    assert f"plane {plane + 1} of expert 5 of layer 1: wrong bytes from flash" in caplog.text
    assert asked == [("layers.1.experts", layer.offset(5, plane), layer.plane_bytes[plane])]
    assert layer.path.read_bytes() == good
    np.testing.assert_array_equal(got, run_experts(*rows, mapped(own_bundle, layer), activation="silu"))


def test_what_is_waited_for_is_read_before_upgrades(bundle: Bundle) -> None:
    """One lane, held until both an upgrade and an expert are asked for: the expert comes first."""
    layer = layers_of(bundle)[0]
    go_on = threading.Event()
    offsets: list[int] = []

    def noted(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        assert go_on.wait(10)
        offsets.append(offset_bytes)
        return read_into(descriptor, target, offset_bytes)

    arena = memoryview(bytearray(3 * layer.stride_bytes))
    slots = [arena[i * layer.stride_bytes : (i + 1) * layer.stride_bytes] for i in range(3)]
    flash = reader.ExpertReader(layers_of(bundle), lanes=1, direct=False, read=noted)
    batch = reader.ReadBatch()
    flash.submit(batch, layer, 0, slots[0], (0,))
    flash.submit(batch, layer, 1, slots[1], (1,), later=True)
    flash.submit(batch, layer, 2, slots[2], (0,))
    go_on.set()
    order = [batch.arrived.get() for _ in range(3)]
    flash.close()
    assert [(arrival.expert, arrival.plane) for arrival in order] == [(0, 0), (2, 0), (1, 1)]
    assert bytes(slots[2][: layer.plane_bytes[0]]) == data_of(bundle, layer, 2)[: layer.plane_bytes[0]]


def test_peers_check_every_plane(bundle: Bundle) -> None:
    layer = layers_of(bundle)[0]
    store = PeerStore([layer], {layer.layer: [2]})
    good = data_of(bundle, layer, 2)
    for plane in range(layer.planes):
        wrong = bytearray(good)
        wrong[layer.plane_start(plane)] ^= 1
        assert not store.put(layer.layer, 2, bytes(wrong))
    assert not store.put(layer.layer, 2, good[: layer.plane_bytes[0]])
    assert store.put(layer.layer, 2, good)


def test_planes_that_do_not_hold_their_parts_are_refused(bundle: Bundle) -> None:
    manifest = bundle.manifest
    name = next(name for name, tensor in manifest.tensors.items() if tensor.is_experts)
    tensor = manifest.tensors[name]

    def refused(match: str, **parts: int) -> None:
        moved = {
            key: replace(part, offset_bytes=part.offset_bytes + parts.get(key, 0))
            for key, part in tensor.parts.items()
        }
        wrong = replace(tensor, parts=moved)
        with pytest.raises(BundleError, match=match):
            check_manifest(replace(manifest, tensors={**manifest.tensors, name: wrong}))

    check_manifest(manifest)
    last = "gate_fine" if "gate_fine" in tensor.parts else "gate_low"
    refused("planes don't start on pages", gate_low=64)
    refused("planes don't start on pages", **{last: 64})
    refused("down_scales reaches beyond its plane", down_scales=4096)
    few = replace(tensor, expert_digests=tensor.expert_digests[: tensor.shape[0]])
    with pytest.raises(BundleError, match="expert digests"):
        check_manifest(replace(manifest, tensors={**manifest.tensors, name: few}))
