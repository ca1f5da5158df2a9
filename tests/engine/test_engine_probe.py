"""The probe: it finds rows that depend on their neighbours, measures in bounded time, and disturbs no session."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch
from edge_runtime.engine.blocks import LoadedBlock
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.numeric_class import native_class, onnx_class, processor_features
from edge_runtime.engine.probe import BATCH_SIZES, CHUNK_ROWS, probe
from tests.support.stages import span, ticking
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("probe") / "bundle", TinyModel(format="int4", experts=4))


def load(bundle: Bundle, first: int, last: int) -> CpuStage:
    return CpuStage.load(bundle, LayerRange(first, last), threads=1, kv_budget_bytes=4 << 20)


def test_a_good_stage_is_invariant_and_timed(bundle: Bundle) -> None:
    result = probe(load(bundle, 0, 2), clock=ticking(1e-3))
    assert result.row_invariant, result.why_not
    assert result.checked_rows == max(BATCH_SIZES)
    assert result.layer_decode_seconds == pytest.approx(1e-3)  # whatever is timed takes one tick
    assert result.layer_prefill_row_seconds == pytest.approx(1e-3 / CHUNK_ROWS)
    assert result.head_seconds == pytest.approx(1e-3)
    assert result.numeric_class == native_class("int4")
    assert "/w:int4/kv:fp32/wire:fp32/k:" in result.numeric_class


def test_an_inner_layer_is_enough(bundle: Bundle) -> None:
    result = probe(load(bundle, 1, 1), clock=ticking(1e-3))
    assert result.row_invariant
    assert result.head_seconds == 0


@pytest.mark.parametrize("block", ["layers.0", "head"])
def test_rows_that_depend_on_their_number_are_found(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    run = LoadedBlock.run

    def dependent(self: LoadedBlock, hidden: np.ndarray, *rest: object) -> np.ndarray:
        result = run(self, hidden, *rest)
        return result * np.float32(1.0000001) if self.name == block and len(hidden) == 16 else result

    monkeypatch.setattr(LoadedBlock, "run", dependent)
    result = probe(load(bundle, 0, 2), clock=ticking(1e-3))
    assert not result.row_invariant
    assert "16 rows" in result.why_not


def test_open_sessions_are_not_disturbed(bundle: Bundle) -> None:
    stage = load(bundle, 0, 2)
    for session in (1, 2):
        stage.open(SessionId(session), 20)
        stage.run(Batch((span(session, 0, range(10), 0),), None))
    before = stage.run(Batch((span(1, 10, [3]),), None))
    used = stage.kv_used_tokens
    probe(stage, clock=ticking(1e-2))
    assert stage.kv_used_tokens == used
    assert np.array_equal(stage.run(Batch((span(2, 10, [3]),), None)), before)


def test_what_holds_most_runs_up_is_not_measured(bundle: Bundle) -> None:
    luck, now = random.Random(0), 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3 if luck.random() < 0.4 else 2e-3
        return now

    result = probe(load(bundle, 0, 2), clock=clock)
    assert result.layer_decode_seconds == pytest.approx(1e-3)
    assert result.head_seconds == pytest.approx(1e-3)


def test_a_slow_machine_stops_at_its_budget(bundle: Bundle) -> None:
    """Every look at the clock costs a tenth of a second here: far fewer runs, the same kind of answer."""
    result = probe(load(bundle, 0, 2), budget_seconds=2.0, clock=(clock := ticking(0.1)))
    assert result.row_invariant
    assert 2 <= result.checked_rows < max(BATCH_SIZES)
    assert clock() < 6.0


def test_an_encoder_is_probed_by_whole_sequences(tmp_path: Path) -> None:
    encoder = build_tiny_bundle(tmp_path / "encoder", TinyModel(kind="encoder", qk_norm=False))
    result = probe(load(encoder, 0, 2), budget_seconds=0.2)
    assert result.row_invariant
    assert result.head_seconds == 0


def test_the_class_names_what_decides_bits(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma avx512f amx_int8\n")
    assert processor_features(cpuinfo) == ("avx2", "fma", "avx512f", "amx_int8")
    cpuinfo.write_text("Features\t: fp asimddp i8mm\n")
    assert processor_features(cpuinfo) == ("asimddp", "i8mm")
    assert processor_features(tmp_path / "absent") == ()
    assert onnx_class("1.31.1", "int8") != onnx_class("1.31.1", "int4")
    assert onnx_class("1.31.1", "int8") != native_class("int8") != native_class("int4")
    assert " " not in onnx_class("1.31.1", "int8")
