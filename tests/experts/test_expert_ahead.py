"""Experts kept or read ahead on a guess: the bits are those without, and whoever is asked for goes first."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.errors import EngineError
from edge_runtime.experts.ahead import ReadAhead
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers, token_cycle_bytes
from edge_runtime.experts.lanes import ReadInto, read_into
from edge_runtime.experts.pool import make_pools
from edge_runtime.experts.prediction_setting import AUTO, KEEP, OFF, PREDICTIONS, READ
from edge_runtime.experts.reader import ExpertReader
from edge_runtime.experts.slot_table import ABSENT
from edge_runtime.experts.statistics import CacheStatistics
from edge_runtime.experts.trial import Trial, TrialRules
from tests.support.stages import span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS, EXPERTS = 3, 8
ALL = LayerRange(0, LAYERS - 1)
SESSION = SessionId(1)
ALWAYS_TRYING = TrialRules(warm_up_tokens=1, block_tokens=1, pairs=3, again_tokens=2)
Rows = NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("ahead") / "bundle", model)


def layers_of(bundle: Bundle) -> tuple[ExpertLayer, ...]:
    return expert_layers(bundle, bundle.manifest.layers)


@contextmanager
def stage_of(bundle: Bundle, options: CacheOptions | None, threads: int = 1) -> Iterator[CpuStage]:
    stage = CpuStage.load(bundle, ALL, threads=threads, kv_budget_bytes=1 << 20, experts=options)
    try:
        yield stage
    finally:
        stage.close()


def cycles_bytes(bundle: Bundle, cycles: float) -> int:
    return int(cycles * token_cycle_bytes(bundle.manifest, ALL.first, ALL.last))


def logits(
    stage: CpuStage, chunks: Sequence[int], seed: int, before: Callable[[], None] = lambda: None
) -> Rows:
    ids = np.random.default_rng(seed).integers(0, 200, sum(chunks)).tolist()
    stage.open(SESSION, len(ids))
    rows, start = [], 0
    for size in chunks:
        before()
        rows.append(stage.run(Batch((span(1, start, ids[start : start + size]),), None)))
        start += size
    stage.drop(SESSION)
    return np.concatenate(rows)


def check_same(got: Rows, wanted: Rows) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 1, 2, 4, 9]), min_size=1, max_size=16),
    cycles=st.floats(1.0, 4.0),
    mode=st.sampled_from([AUTO, KEEP, READ, READ]),
    policy=st.sampled_from(["lru", "lfru", "lfru"]),
    ring=st.booleans(),
    one_call=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_same_bits_whatever_is_guessed(
    bundle: Bundle,
    chunks: list[int],
    cycles: float,
    mode: str,
    policy: str,
    ring: bool,
    one_call: bool,
    threads: int,
    seed: int,
) -> None:
    """AUTO with trials that never end for long: all is switched on and off, all the time."""
    with stage_of(bundle, None) as stage:
        wanted = logits(stage, chunks, seed)
    options = CacheOptions(
        cycles_bytes(bundle, cycles), policy=policy, ring=ring, one_call=one_call, prediction=mode
    )
    with stage_of(bundle, options, threads) as stage:
        always_trying(stage)
        check_same(logits(stage, chunks, seed), wanted)
        check_same(logits(stage, chunks, seed), wanted)


def always_trying(stage: CpuStage) -> None:
    assert stage.experts is not None
    prediction = stage.experts.prediction
    assert prediction is not None
    prediction.keeping, prediction.reading = Trial("keeping", ALWAYS_TRYING), Trial("reading", ALWAYS_TRYING)


@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 9]), min_size=1, max_size=8),
    cycles=st.floats(1.0, 4.0),
    share=st.sampled_from([0.05, 0.3, 1.0]),
    ring=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bits_that_flip_on_flash_change_nothing(
    bundle: Bundle, tmp_path: Path, chunks: list[int], cycles: float, share: float, ring: bool, seed: int
) -> None:
    """Anew before every step, in what is read ahead like in what is asked for."""
    chance = random.Random(seed)
    with stage_of(bundle, None) as stage:
        wanted = logits(stage, chunks, seed)
    shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    shutil.copytree(bundle.path, tmp_path / "damaged")
    damaged = Bundle.open(tmp_path / "damaged")

    def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
        return bundle.read(key, offset_bytes, length_bytes)[0]

    def flip_some() -> None:
        for layer in layers_of(damaged):
            for expert in range(EXPERTS):
                if chance.random() < share:
                    flip(layer, expert, chance.randrange(layer.stride_bytes))

    options = CacheOptions(cycles_bytes(bundle, cycles), ring=ring, refetch=refetch, prediction=READ)
    with stage_of(damaged, options) as stage:
        check_same(logits(stage, chunks, seed, flip_some), wanted)


def flip(layer: ExpertLayer, expert: int, byte: int) -> None:
    with layer.path.open("r+b") as file:
        file.seek(layer.offset(expert) + byte)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 0x40]))


@given(cycles=st.floats(1.0, 3.0), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_same_bits_under_read_errors(bundle: Bundle, cycles: float, seed: int) -> None:
    chance, lock = random.Random(seed), threading.Lock()

    def unreliable(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        with lock:
            kind = chance.choice(("right", "right", "right", "error", "end", "flipped"))
        if kind == "error":
            raise OSError("input/output error")
        if kind == "end":
            return 0
        count = read_into(descriptor, target, offset_bytes)
        if kind == "flipped":
            target[count // 2] ^= 1
        return count

    def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
        return bundle.read(key, offset_bytes, length_bytes)[0]

    chunks = [5, 1, 1, 1, 2, 1, 1]
    with stage_of(bundle, None) as stage:
        wanted = logits(stage, chunks, seed)
    options = CacheOptions(
        cycles_bytes(bundle, cycles), lanes=3, refetch=refetch, read=unreliable, prediction=READ
    )
    with stage_of(bundle, options) as stage:
        check_same(logits(stage, chunks, seed), wanted)


# ---------------------------------------------------------------- reading ahead, by itself


class Ahead:
    """Two pools' worth of nothing but slots: `slots` of them, and flash that answers when it is let."""

    def __init__(self, bundle: Bundle, slots: int, read: ReadInto = read_into) -> None:
        self.layers = layers_of(bundle)
        self.pool = make_pools(self.layers, slots * self.layers[0].stride_bytes, "lfru")[0]
        self.statistics = CacheStatistics(layer.layer for layer in self.layers)
        self.reader = ExpertReader(self.layers, lanes=1, read=read)
        self.ahead = ReadAhead(self.reader, self.statistics)
        self.checked = 0

    def begin(self, layer: int, experts: Sequence[int], uses: int = 2) -> None:
        self.ahead.begin(self.pool, self.layers[layer], experts, 0, uses, self.check)

    def check(self) -> None:
        self.checked += 1

    def slot(self, layer: int, expert: int) -> int:
        return self.pool.table.slot(self.pool.first_key[layer] + expert)

    def close(self) -> None:
        self.ahead.cancel()
        self.reader.close()


def test_what_is_asked_for_is_waited_for_and_the_rest_given_up_where_flash_is_needed(bundle: Bundle) -> None:
    gate = threading.Event()

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        gate.wait()
        return read_into(descriptor, target, offset_bytes)

    own = Ahead(bundle, 12, slow)
    try:
        own.begin(1, [3, 5, 6])
        assert own.checked == 1
        assert set(own.ahead.flying) == {(1, 3), (1, 5), (1, 6)}
        threading.Timer(0.05, gate.set).start()
        own.ahead.settle(1, {3, 7}, is_missed=True)
        assert own.slot(1, 3) != ABSENT
        own.ahead.stop()
        assert not own.ahead.flying
        assert own.slot(1, 5) == own.slot(1, 6) == ABSENT  # not begun when they were given up
        layer = own.statistics.layers[1]
        assert (layer.read_ahead, layer.used_ahead) == (1, 1)
        assert layer.read_ahead_bytes == own.layers[1].stride_bytes
    finally:
        gate.set()
        own.close()


def test_bytes_of_what_is_on_its_way_stay_their_own(bundle: Bundle) -> None:
    """Its slot goes to nobody, and afterwards holds what the manifest says."""
    gate = threading.Event()

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        gate.wait()
        return read_into(descriptor, target, offset_bytes)

    own = Ahead(bundle, 8, slow)
    try:
        own.begin(1, [3], uses=1)
        slot = own.slot(1, 3)
        taken = {own.pool.table.admit(own.pool.first_key[0] + expert, 0, 1) for expert in range(7)}
        assert slot not in taken
        own.pool.table.unpin_all()
        for expert in range(7):
            assert own.pool.table.admit(own.pool.first_key[2] + expert, 9, 1) != slot
        gate.set()
        own.ahead.settle(1, {3}, is_missed=False)
        wanted = bundle.read(own.layers[1].slice, own.layers[1].offset(3), own.layers[1].stride_bytes)[0]
        assert own.pool.arena.slot(slot).tobytes() == bytes(wanted)
    finally:
        gate.set()
        own.close()


def test_what_can_not_be_had_is_forgotten_without_a_word(bundle: Bundle) -> None:
    def broken(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        raise OSError("input/output error")

    own = Ahead(bundle, 12, broken)
    try:
        own.begin(1, [3])
        own.ahead.settle(1, {3}, is_missed=False)
        assert own.slot(1, 3) == ABSENT
        assert own.statistics.total.read_ahead == 0
        assert all(own.pool.table.admit(key, 0, 1) != ABSENT for key in range(12))  # nothing is held
    finally:
        own.close()


@pytest.mark.parametrize(("slots", "uses", "begun"), [(6, 2, 1), (6, 3, 0), (24, 2, 4)])
def test_the_layer_that_runs_keeps_its_slots(bundle: Bundle, slots: int, uses: int, begun: int) -> None:
    own = Ahead(bundle, slots)
    try:
        own.begin(1, range(EXPERTS), uses)
        assert len(own.ahead.flying) + own.statistics.total.read_ahead == begun
    finally:
        own.ahead.stop()
        own.close()


# ---------------------------------------------------------------- when


def test_right_guesses_are_read_and_used(bundle: Bundle) -> None:
    options = CacheOptions(cycles_bytes(bundle, 1.5), prediction=READ)
    with stage_of(bundle, options) as stage:
        logits(stage, [1] * 80, 0)
        assert stage.experts is not None
        total = stage.experts.statistics.total
    assert total.read_ahead > 0
    assert 0 < total.used_ahead <= total.read_ahead
    assert total.compared > 0
    assert 0 < total.gate_recall <= 1
    assert 0 < total.affinity_recall <= 1


def test_off_and_where_there_is_nothing_to_guess_nothing_is_done(bundle: Bundle, tmp_path: Path) -> None:
    with stage_of(bundle, CacheOptions(cycles_bytes(bundle, 2), prediction=OFF)) as stage:
        assert stage.experts is not None
        assert stage.experts.prediction is None
    one = build_tiny_bundle(tmp_path / "one", TinyModel(layers=1, experts=EXPERTS))
    cache = ExpertCache(layers_of(one), CacheOptions(1 << 20, prediction=READ))
    assert cache.prediction is None
    cache.close()


def test_a_few_tokens_try_nothing_and_say_so(bundle: Bundle) -> None:
    with stage_of(bundle, CacheOptions(cycles_bytes(bundle, 2))) as stage:
        logits(stage, [5] + [1] * 20, 0)
        assert stage.experts is not None
        prediction = stage.experts.prediction
        assert prediction is not None
        assert stage.experts.statistics.total.read_ahead == 0
        assert "keeping them: off, not tried yet" in prediction.says


def test_trials_take_turns_and_reach_a_verdict(bundle: Bundle) -> None:
    with stage_of(bundle, CacheOptions(cycles_bytes(bundle, 1.5))) as stage:
        always_trying(stage)
        assert stage.experts is not None
        prediction = stage.experts.prediction
        assert prediction is not None
        both = 0
        for seed in range(4):
            logits(stage, [1] * 30, seed)
            both += prediction.keeping.is_trying and prediction.reading.is_trying
        assert both == 0
        assert "over " in prediction.reading.says or prediction.reading.is_trying


@pytest.mark.parametrize("mode", ["", "on", "READ"])
def test_other_modes_are_refused(bundle: Bundle, mode: str) -> None:
    with pytest.raises(EngineError, match="no way to use predictions") as refused:
        ExpertCache(layers_of(bundle), CacheOptions(cycles_bytes(bundle, 2), prediction=mode))
    assert all(known in refused.value.hint for known in PREDICTIONS)
