"""Experts that are used before they are checked: nothing that came of wrong bytes leaves a stage."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.flash import works
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, StageFormats
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.errors import TamperedError
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers, token_cycle_bytes
from edge_runtime.experts.reader import Cancelled, Refetch
from tests.support.stages import span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS, EXPERTS = 3, 8
ALL = LayerRange(0, LAYERS - 1)
SESSION = SessionId(1)

pytestmark = [
    pytest.mark.skipif(not works(), reason="this system has no io_uring"),
    pytest.mark.usefixtures("small_pieces"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("unchecked") / "bundle", model)


@pytest.fixture
def damaged(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy for tests that damage it."""
    return copy_of(bundle, tmp_path / "damaged")


def copy_of(bundle: Bundle, path: Path) -> Bundle:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(bundle.path, path)
    return Bundle.open(path)


def layers_of(bundle: Bundle) -> tuple[ExpertLayer, ...]:
    return expert_layers(bundle, bundle.manifest.layers)


def flip(layer: ExpertLayer, expert: int, byte: int) -> None:
    with layer.path.open("r+b") as file:
        file.seek(layer.offset(expert) + byte)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 0x40]))


def flip_some(bundle: Bundle, chance: random.Random, share: float) -> None:
    for layer in layers_of(bundle):
        for expert in range(EXPERTS):
            if chance.random() < share:
                flip(layer, expert, chance.randrange(layer.stride_bytes))


def pristine(bundle: Bundle) -> Refetch:
    return lambda key, offset_bytes, length_bytes: bundle.read(key, offset_bytes, length_bytes)[0]


@contextmanager
def stage_of(
    bundle: Bundle, options: CacheOptions | None, threads: int = 1, formats: StageFormats | None = None
) -> Iterator[CpuStage]:
    formats = formats or StageFormats()
    stage = CpuStage.load(
        bundle, ALL, threads=threads, kv_budget_bytes=1 << 20, experts=options, formats=formats
    )
    try:
        yield stage
    finally:
        stage.close()


def cycles_bytes(bundle: Bundle, cycles: float) -> int:
    return int(cycles * token_cycle_bytes(bundle.manifest, ALL.first, ALL.last))


def logits(
    stage: CpuStage, chunks: Sequence[int], seed: int, before: Callable[[], None] = lambda: None
) -> NDArray[np.float32]:
    """Random ids in chunks of so many rows; `before` comes before each."""
    ids = np.random.default_rng(seed).integers(0, 200, sum(chunks)).tolist()
    stage.open(SESSION, len(ids))
    rows, start = [], 0
    for size in chunks:
        before()
        rows.append(stage.run(Batch((span(1, start, ids[start : start + size]),), None)))
        start += size
    stage.drop(SESSION)
    return np.concatenate(rows)


def check_same(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 9]), min_size=1, max_size=8),
    cycles=st.floats(1.0, 4.0),
    threads=st.integers(1, 3),
    kv=st.sampled_from(["fp32", "int8"]),
    share=st.sampled_from([0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bits_that_flip_on_flash_change_nothing(
    bundle: Bundle,
    tmp_path: Path,
    chunks: list[int],
    cycles: float,
    threads: int,
    kv: str,
    share: float,
    seed: int,
) -> None:
    """In any layer, for prompts and decoding, anew before every step."""
    formats, chance = StageFormats(kv=kv), random.Random(seed)
    with stage_of(bundle, None, formats=formats) as stage:
        wanted = logits(stage, chunks, seed)
    damaged = copy_of(bundle, tmp_path / "damaged")
    options = CacheOptions(cycles_bytes(bundle, cycles), refetch=pristine(bundle))
    with stage_of(damaged, options, threads, formats) as stage:
        assert stage.experts is not None
        assert stage.experts.kernel_reads
        got = logits(stage, chunks, seed, lambda: flip_some(damaged, chance, share))
        if share == 1.0:
            assert stage.experts.reader.counters.refetched > 0
    check_same(got, wanted)


@given(
    chunks=st.lists(st.sampled_from([1, 1, 9]), min_size=1, max_size=5),
    cut_layer=st.integers(0, LAYERS - 1),
    kept=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_that_end_early_change_nothing(
    bundle: Bundle, tmp_path: Path, chunks: list[int], cut_layer: int, kept: float, seed: int
) -> None:
    """Which is known when a read ends, while what came before it is not checked yet: other bits have flipped, too."""
    with stage_of(bundle, None) as stage:
        wanted = logits(stage, chunks, seed)
    damaged, chance = copy_of(bundle, tmp_path / "damaged"), random.Random(seed)
    options = CacheOptions(cycles_bytes(bundle, 1.5), refetch=pristine(bundle))
    with stage_of(damaged, options, threads=2) as stage:
        flip_some(damaged, chance, 0.5)
        path = layers_of(damaged)[cut_layer].path
        os.truncate(path, int(kept * path.stat().st_size))
        got = logits(stage, chunks, seed)
    check_same(got, wanted)


def test_a_step_with_wrong_bytes_runs_twice_and_mends_flash(
    bundle: Bundle, damaged: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    good = [layer.path.read_bytes() for layer in layers_of(bundle)]
    for layer in layers_of(damaged):
        for expert in range(EXPERTS):
            flip(layer, expert, 100)
    with stage_of(bundle, None) as stage:
        wanted = logits(stage, [9], 0)
    options = CacheOptions(cycles_bytes(bundle, 8), refetch=pristine(bundle))
    with stage_of(damaged, options) as stage:
        check_same(logits(stage, [9], 0), wanted)
        assert stage.experts is not None
        mended = stage.experts.reader.counters.refetched
        assert mended == stage.experts.statistics.total.misses > 0
        check_same(logits(stage, [9], 0), wanted)
        assert stage.experts.reader.counters.refetched == mended  # from memory now
    assert "wrong bytes from flash" in caplog.text
    found = [layer.path.read_bytes() for layer in layers_of(damaged)]
    differ = sum(
        before[layer.offset(expert) :][: layer.stride_bytes]
        != after[layer.offset(expert) :][: layer.stride_bytes]
        for layer, before, after in zip(layers_of(bundle), good, found, strict=True)
        for expert in range(EXPERTS)
    )
    assert differ == LAYERS * EXPERTS - mended


def test_what_can_not_be_had_fails_the_step_and_no_other(bundle: Bundle, damaged: Bundle) -> None:
    layer = layers_of(damaged)[1]
    for expert in range(EXPERTS):
        flip(layer, expert, 0)
    with stage_of(damaged, CacheOptions(cycles_bytes(bundle, 8))) as stage:
        for _ in range(2):
            stage.open(SESSION, 4)
            with pytest.raises(TamperedError, match=r"expert \d of layer 1 \(slice layers\.1\.experts\)"):
                stage.run(Batch((span(1, 0, [1, 2]),), None))
            assert stage.rows(SESSION) == 0
            stage.drop(SESSION)
        layer.path.write_bytes(layers_of(bundle)[1].path.read_bytes())
        with stage_of(bundle, None) as whole:
            wanted = logits(whole, [4, 1], 3)
        check_same(logits(stage, [4, 1], 3), wanted)


def test_what_fails_otherwise_is_checked_all_the_same(bundle: Bundle, damaged: Bundle) -> None:
    """A session that goes in the middle of a step leaves nothing behind that was never checked."""
    for expert in range(EXPERTS):
        flip(layers_of(damaged)[0], expert, 5)
    options = CacheOptions(cycles_bytes(bundle, 8), refetch=pristine(bundle))
    with stage_of(bundle, None) as whole:
        wanted = logits(whole, [3], 0)
    with stage_of(damaged, options) as stage:
        (step,) = stage.blocks["layers.1"].experts_steps
        inner = step.runner

        class Leaves:
            def run(self, *given: object) -> NDArray[np.float32]:
                stage.give_up(SESSION)
                raise Cancelled("the session has gone")

        step.runner = Leaves()
        stage.open(SESSION, 3)
        with pytest.raises(Cancelled):
            stage.run(Batch((span(1, 0, [1, 2, 3]),), None))
        stage.drop(SESSION)
        step.runner = inner
        check_same(logits(stage, [3], 0), wanted)
