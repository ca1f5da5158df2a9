"""What was read is right or said to be wrong; digests are those of the BLAKE3 package."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from edge_kernels.experts import ExpertWeights, run_experts
from edge_kernels.flash import WRONG_BYTES, FlashReads, Part, digest, works
from edge_kernels.quantization import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

PIECE_BYTES = 64 << 10
FILE_BYTES = 3 << 20

needs_ring = pytest.mark.skipif(not works(), reason="this system has no io_uring")


@given(
    chunks=st.integers(2, 700),
    rest=st.sampled_from([0, 0, 1, 63, 64, 1000]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_digest_is_blake3(isa: str, chunks: int, rest: int, threads: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, chunks * 1024 + rest, np.uint8)
    assert digest(data, threads) == blake3(data.tobytes()).digest()


@pytest.mark.parametrize("size", [0, 1, 64, 1023, 1024, 1025, 2048])
def test_digest_of_a_few_bytes(isa: str, size: int) -> None:
    data = np.arange(size, dtype=np.uint8)
    assert digest(data) == blake3(data.tobytes()).digest()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, bytes]]:
    path: Path = tmp_path_factory.mktemp("flash") / "file"
    data = np.random.default_rng(0).integers(0, 256, FILE_BYTES, np.uint8).tobytes()
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor, data
    os.close(descriptor)


def part_of(file: tuple[int, bytes], key: int, offset: int, size: int, target: int) -> Part:
    data = file[1][offset : offset + size]
    pieces = [blake3(data[at : at + PIECE_BYTES]).digest() for at in range(0, size, PIECE_BYTES)]
    return Part(
        key,
        file[0],
        offset,
        size,
        target,
        pieces[0] if len(pieces) == 1 else blake3(b"".join(pieces)).digest(),
    )


def land_all(reads: FlashReads, parts: int, threads: int) -> dict[int, str]:
    found: dict[int, str] = {}
    while len(found) < parts:
        landed = reads.land(threads)
        assert landed
        found |= {one.key: one.problem for one in landed}
    assert reads.land(threads) == []
    return found


@needs_ring
def test_timed_reads_bring_the_bytes_and_leave_nothing_behind(file: tuple[int, bytes]) -> None:
    reads, memory = FlashReads(PIECE_BYTES), np.zeros(400 << 10, np.uint8)
    unchecked = [
        replace(part_of(file, key, offset, 192 << 10, key * (192 << 10)), digest=bytes(32))
        for key, offset in enumerate((4096, 1 << 20))
    ]
    assert reads.time_reads(memory, unchecked) > 0.0
    for part in unchecked:
        wanted = file[1][part.offset_bytes : part.offset_bytes + part.size_bytes]
        assert memory[part.target_byte : part.target_byte + part.size_bytes].tobytes() == wanted
    assert reads.times.asking > 0.0
    weights = random_experts(0)
    ids = np.array([[0, 1]], np.int32)
    memory[:] = 0
    rows = np.ones((1, weights.hidden), np.float32)
    assert reads.time_reads_beside(memory, unchecked, rows, ids, weights, threads=2) > 0.0
    for part in unchecked:
        wanted = file[1][part.offset_bytes : part.offset_bytes + part.size_bytes]
        assert memory[part.target_byte : part.target_byte + part.size_bytes].tobytes() == wanted
    with pytest.raises(RuntimeError, match="can't be read"):
        reads.time_reads(memory, [replace(unchecked[0], offset_bytes=FILE_BYTES)])
    assert land_all(reads, 0, 1) == {}


@needs_ring
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=40),
    batches=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_land_in_their_places(
    file: tuple[int, bytes], sizes: list[int], batches: int, threads: int, seed: int
) -> None:
    """More of them than fit into the ring, asked for in several batches, into memory that is not empty."""
    rng = np.random.default_rng(seed)
    reads = FlashReads(PIECE_BYTES)
    memory = rng.integers(0, 256, sum(sizes) * 2048 + 4096, np.uint8)
    wanted = memory.copy()
    target, parts = 2048, []
    for key, grains in enumerate(sizes):
        size = grains * 2048
        offset = int(rng.integers(0, (FILE_BYTES - size) // 512)) * 512
        parts.append(part_of(file, key, offset, size, target))
        wanted[target : target + size] = np.frombuffer(file[1], np.uint8)[offset : offset + size]
        target += size
    for batch in range(batches):
        if parts[batch::batches]:
            reads.submit(memory, parts[batch::batches])
    assert land_all(reads, len(parts), threads) == dict.fromkeys(range(len(parts)), "")
    np.testing.assert_array_equal(memory, wanted)


@needs_ring
def test_wrong_bytes_short_files_and_errors_are_told_apart(file: tuple[int, bytes]) -> None:
    reads = FlashReads(PIECE_BYTES)
    memory = np.zeros(1 << 20, np.uint8)
    good = part_of(file, 0, 4096, 5 * PIECE_BYTES, 0)
    flipped = Part(1, good.file, 8192, good.size_bytes, 5 * PIECE_BYTES, good.digest)
    beyond = Part(2, good.file, FILE_BYTES - 2048, 4096, 10 * PIECE_BYTES, good.digest)
    closed = Part(3, 1 << 20, 0, 4096, 10 * PIECE_BYTES + 4096, good.digest)
    reads.submit(memory, [good, flipped, beyond, closed])
    found = land_all(reads, 4, 2)
    assert found[0] == ""
    assert "signed" in found[1]
    assert "signed" in found[2]
    assert found[3] == os.strerror(9)
    reads.submit(memory, [good])
    assert land_all(reads, 1, 1) == {0: ""}


@needs_ring
def test_given_up_reads_are_forgotten(file: tuple[int, bytes]) -> None:
    reads = FlashReads(PIECE_BYTES)
    memory = np.zeros(FILE_BYTES, np.uint8)
    parts = [part_of(file, key, 0, 2 << 20, 0) for key in range(8)]
    reads.submit(memory, parts)
    reads.give_up()
    assert reads.land() == []
    before = memory.copy()
    reads.submit(memory, parts[:1])
    assert land_all(reads, 1, 1) == {0: ""}
    np.testing.assert_array_equal(memory[: 2 << 20], np.frombuffer(file[1], np.uint8)[: 2 << 20])
    np.testing.assert_array_equal(memory[2 << 20 :], before[2 << 20 :])


@needs_ring
def test_impossible_parts_are_refused(file: tuple[int, bytes]) -> None:
    reads = FlashReads(PIECE_BYTES)
    memory = np.zeros(8192, np.uint8)
    for part in (
        Part(0, file[0], 0, 1000, 0, bytes(32)),
        Part(0, file[0], 0, 4096, 6144, bytes(32)),
        Part(0, file[0], -4096, 4096, 0, bytes(32)),
    ):
        with pytest.raises(ValueError, match="fit into its memory"):
            reads.submit(memory, [part])
    with pytest.raises(ValueError, match="pieces"):
        FlashReads(1000)


@needs_ring
@given(rows=st.integers(1, 9), absent=st.integers(0, 4), threads=st.integers(1, 3), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_experts_on_their_way_give_the_bits_of_those_that_are_here(
    tmp_path_factory: pytest.TempPathFactory, rows: int, absent: int, threads: int, seed: int
) -> None:
    whole = random_experts(seed)
    path = tmp_path_factory.mktemp("arriving") / "experts"
    path.write_bytes(whole.buffer.tobytes())
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(EXPERTS)[:2] for _ in range(rows)], np.int32)
    x = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
    gates = rng.random((rows, 2)).astype(np.float32)
    wanted = run_experts(x, ids, gates, whole, activation="silu")
    missing = [int(expert) for expert in np.unique(ids)[:absent]]
    memory = whole.buffer.copy()
    for expert in missing:
        memory[expert * STRIDE_BYTES : (expert + 1) * STRIDE_BYTES] = 0xFF  # NaN, if it were used
    descriptor = os.open(path, os.O_RDONLY)
    try:
        stored = descriptor, path.read_bytes()
        parts = [part_of(stored, e, e * STRIDE_BYTES, STRIDE_BYTES, e * STRIDE_BYTES) for e in missing]
        reads = FlashReads(PIECE_BYTES)
        here = replace(whole, buffer=memory)
        slots = [(expert, expert) for expert in missing]

        def run() -> tuple[NDArray[np.float32] | None, dict[int, str]]:
            if parts:
                reads.submit(memory, parts)
            result, landed = reads.run_experts(slots, x, ids, gates, here, activation="silu", threads=threads)
            return result, {one.key: one.problem for one in landed}

        result, landed = run()
        assert landed == dict.fromkeys(missing, "")
        assert result is not None
        np.testing.assert_array_equal(result.view(np.uint32), wanted.view(np.uint32))
        if parts:
            parts[0] = replace(parts[0], digest=bytes(32))
            assert run() == (None, dict.fromkeys(missing, "") | {missing[0]: WRONG_BYTES})
    finally:
        os.close(descriptor)


@needs_ring
@pytest.mark.parametrize("threads", [1, 2])
def test_flash_that_takes_longer_than_threads_stay_awake(threads: int) -> None:
    """A pipe in its place, into which somebody writes later: first those who only wait, then those who also compute."""
    import fcntl  # there where io_uring is

    whole = random_experts(1)
    expert = whole.buffer[:STRIDE_BYTES].tobytes()
    ids, gates = np.array([[0, 1]], np.int32), np.ones((1, 2), np.float32)
    x = np.random.default_rng(1).normal(size=(1, HIDDEN)).astype(np.float32)
    wanted = run_experts(x, ids, gates, whole, activation="silu")
    memory = whole.buffer.copy()
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 2 * STRIDE_BYTES)  # all of it in one write
        reads = FlashReads(STRIDE_BYTES)
        part = Part(7, out, 0, STRIDE_BYTES, 0, blake3(expert).digest())
        for computes in (False, True):
            memory[:STRIDE_BYTES] = 0xFF
            waited_before = reads.waited_seconds
            reads.submit(memory, [part])
            writer = threading.Timer(LATE_SECONDS, os.write, (into, expert))
            writer.start()
            if computes:
                here = replace(whole, buffer=memory)
                result, landed = reads.run_experts(
                    [(7, 0)], x, ids, gates, here, activation="silu", threads=threads
                )
                assert result is not None
                np.testing.assert_array_equal(result.view(np.uint32), wanted.view(np.uint32))
            else:
                landed = reads.land(threads)
            writer.join()
            assert [(one.key, one.problem) for one in landed] == [(7, "")]
            assert reads.waited_seconds - waited_before > LATE_SECONDS / 2
    finally:
        os.close(out)
        os.close(into)


LATE_SECONDS = 0.03  # more than any thread waits awake
HIDDEN, INTERMEDIATE, EXPERTS = 256, 160, 6
STRIDE_BYTES = 96 << 10


def random_experts(seed: int) -> ExpertWeights:
    """int4, each padded to 96 KiB."""
    rng = np.random.default_rng(seed)
    buffer = np.zeros(EXPERTS * STRIDE_BYTES, np.uint8)
    offsets: dict[str, int] = {}
    for expert in range(EXPERTS):
        end = 0
        for part, shape in {
            "gate": (INTERMEDIATE, HIDDEN),
            "up": (INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }.items():
            matrix = quantize(rng.normal(size=shape).astype(np.float32), "int4")
            for name, array in ((part, matrix.data), (f"{part}_scales", matrix.scales)):
                data = np.frombuffer(array.tobytes(), np.uint8)
                start = expert * STRIDE_BYTES + end
                buffer[start : start + data.size] = data
                offsets[name] = end
                end += data.size
    assert end <= STRIDE_BYTES
    return ExpertWeights(buffer, "int4", EXPERTS, HIDDEN, INTERMEDIATE, STRIDE_BYTES, offsets)
