"""A layer whose experts are used before they are checked: the same rows, and every wrong part is named afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from edge_kernels.experts import run_experts
from edge_kernels.flash import WRONG_BYTES, FlashReads, works
from edge_kernels.flash_layer import ExpertSlots, FlashLayer, LayerOnFlash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.test_flash_reads import EXPERTS, HIDDEN, STRIDE_BYTES, random_experts

PIECE_BYTES = 16 << 10
LAYERS, TOP_K = 3, 3
LATE_SECONDS = 0.03  # more than any thread waits awake

pytestmark = pytest.mark.skipif(not works(), reason="this system has no io_uring")


def piece_digest(data: bytes) -> bytes:
    digests = [blake3(data[at : at + PIECE_BYTES]).digest() for at in range(0, len(data), PIECE_BYTES)]
    return blake3(b"".join(digests)).digest() if len(digests) > 1 else digests[0]


def some_rows(seed: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)], np.int32)
    x = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
    return x, ids, rng.random((rows, TOP_K)).astype(np.float32)


@given(
    slots=st.integers(3 * TOP_K, LAYERS * EXPERTS),
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    wrong=st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_wrong_part_is_named(
    tmp_path: Path, slots: int, steps: list[int], wrong: set[tuple[int, int]], threads: int, seed: int
) -> None:
    """Also of experts that had to go before they were checked. Rows are those of what flash gave."""
    whole = random_experts(seed)
    good = whole.buffer.tobytes()
    digests = [
        piece_digest(good[expert * STRIDE_BYTES : (expert + 1) * STRIDE_BYTES]) for expert in range(EXPERTS)
    ]
    memory = np.zeros(slots * STRIDE_BYTES, np.uint8)
    table, reads = ExpertSlots(slots, LAYERS * EXPERTS), FlashReads(PIECE_BYTES)
    weights = whole.__class__(
        memory, whole.format, slots, whole.hidden, whole.intermediate, STRIDE_BYTES, whole.offsets
    )
    files: list[int] = []
    layers: list[FlashLayer] = []
    given_bytes: list[NDArray[np.uint8]] = []
    for number in range(LAYERS):
        data = bytearray(good)
        for damaged, expert in wrong:
            if damaged == number:
                data[expert * STRIDE_BYTES + 40] ^= 1
        path = tmp_path / f"layer {number}"
        path.write_bytes(data)
        files.append(os.open(path, os.O_RDONLY))
        place = LayerOnFlash(files[-1], 0, number * EXPERTS, EXPERTS, (STRIDE_BYTES,), digests)
        layers.append(FlashLayer(table, reads, weights, place))
        given_bytes.append(np.frombuffer(bytes(data), np.uint8))
    asked: set[tuple[int, int]] = set()
    try:
        for step, rows in enumerate(steps):
            for number, layer in enumerate(layers):
                x, ids, gates = some_rows(seed + 10 * step + number, rows)
                found = layer.run(x, ids, gates, step=step, activation="silu", threads=threads, owner=number)
                asked |= {(number, expert) for expert in ids.reshape(-1).tolist()}
                mine = whole.__class__(
                    given_bytes[number],
                    whole.format,
                    EXPERTS,
                    whole.hidden,
                    whole.intermediate,
                    STRIDE_BYTES,
                    whole.offsets,
                )
                assert found.rows is not None
                assert found.landed == ()
                wanted = run_experts(x, ids, gates, mine, activation="silu")
                np.testing.assert_array_equal(found.rows.view(np.uint32), wanted.view(np.uint32))
        named = reads.check(threads)
        assert {(owner, one.key) for owner, one in named} == wrong & asked
        assert all(one.problem == WRONG_BYTES for _, one in named)
        assert reads.check(threads) == []
    finally:
        for file in files:
            os.close(file)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("is_cut", [False, True])
def test_checks_of_one_layer_are_made_while_the_next_waits(
    tmp_path: Path, threads: int, is_cut: bool
) -> None:
    """The second layer's file is a pipe into which somebody writes late, and too little where `is_cut`: all that is not
    right is said at once then, of that layer, and of the first one by `check`."""
    import fcntl  # there where io_uring is

    whole = random_experts(5)
    expert = whole.buffer[:STRIDE_BYTES].tobytes()
    path = tmp_path / "first"
    path.write_bytes(bytes([expert[0] ^ 1]) + expert[1:])
    memory = np.zeros(2 * STRIDE_BYTES, np.uint8)
    weights = whole.__class__(
        memory, whole.format, 2, whole.hidden, whole.intermediate, STRIDE_BYTES, whole.offsets
    )
    table, reads = ExpertSlots(2, 2), FlashReads(STRIDE_BYTES)
    first, (out, into) = os.open(path, os.O_RDONLY), os.pipe()
    x = np.random.default_rng(1).normal(size=(1, HIDDEN)).astype(np.float32)
    ids, gates = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 2 * STRIDE_BYTES)  # all of it in one write
        digest = [blake3(expert).digest()]
        layers = [
            FlashLayer(table, reads, weights, LayerOnFlash(file, 0, number, 1, (STRIDE_BYTES,), digest))
            for number, file in enumerate((first, out))
        ]
        rows = layers[0].run(x, ids, gates, step=0, activation="silu", threads=threads, owner=0).rows
        assert rows is not None
        sent = expert[: STRIDE_BYTES // 2] if is_cut else expert
        writer = threading.Timer(LATE_SECONDS, os.write, (into, sent))
        writer.start()
        found = layers[1].run(x, ids, gates, step=0, activation="silu", threads=threads, owner=1)
        writer.join()
        assert (found.rows is None) == is_cut
        assert [(one.key, one.problem) for one in found.landed] == ([(0, WRONG_BYTES)] if is_cut else [])
        assert [(owner, one.key, one.problem) for owner, one in reads.check(threads)] == [(0, 0, WRONG_BYTES)]
    finally:
        for file in (first, out, into):
            os.close(file)
