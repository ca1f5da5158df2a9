"""The CPU stage on both executors: it agrees with the reference, and a row's bits depend on its own session alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import edge_kernels
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Rows, Span
from edge_runtime.engine.blocks import LoadedBlock
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.errors import EngineError
from tests.support.stage_contract import (
    KV_BYTES,
    MODELS,
    Load,
    LoadBlock,
    Pipelines,
    StageContract,
    check_random_batches,
    pipelines_of,
)
from tests.support.stages import Pipeline, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

# Quantized weights meet int8 activations in this executor and fp32 ones in the reference.
TOLERANCE = {"fp32": 1e-5, "int8": 0.04, "int4": 0.04, "nested4": 0.04, "nested8": 0.04}


@pytest.fixture(scope="module", params=["native", "onnx"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def load(executor: str) -> Load:
    def load(bundle: Bundle, layers: LayerRange, kv_budget_bytes: int = KV_BYTES, **more: Any) -> CpuStage:
        return CpuStage.load(
            bundle, layers, threads=1, kv_budget_bytes=kv_budget_bytes, executor=executor, **more
        )

    return load


@pytest.fixture(scope="module")
def pipelines(load: Load, bundles: dict[str, Bundle]) -> Pipelines:
    return pipelines_of(load, bundles, ("window-softcap", "int4", "experts-int8"))


class TestContract(StageContract):
    @staticmethod
    def blocks_of(stage: CpuStage) -> Mapping[str, object]:
        return stage._blocks

    @pytest.fixture
    def load_block(self, executor: str) -> LoadBlock:
        return lambda bundle, block: LoadedBlock(bundle, block, executor, threads=1)


@pytest.mark.parametrize("name", ["window-softcap", "int4", "experts-int8"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_rows_do_not_depend_on_batch_chunks_or_cuts(
    pipelines: Pipelines, executor: str, name: str, data: st.DataObject
) -> None:
    if (executor, name) == ("onnx", "int4") and "avx512" not in edge_kernels.available_isas():
        # An agent's probe finds out, and such a stage gets a fixed grid of chunks; our own kernels are the default.
        pytest.skip("without AVX-512, ONNX Runtime's 4-bit products of few rows differ from those of one")
    check_random_batches(pipelines, name, data)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_reference(load: Load, bundles: dict[str, Bundle], name: str) -> None:
    ids = np.random.default_rng(1).integers(0, 200, 40).tolist()
    results = []
    for make in (load, ReferenceStage):
        pipeline = Pipeline.load(bundles[name], make)
        pipeline.open(1, 40)
        results.append(
            np.concatenate([pipeline.run(span(1, 0, ids[:33])), pipeline.run(span(1, 33, ids[33:]))])
        )
    fast, reference = results
    errors = np.abs(fast - reference).max(axis=1) / np.abs(reference).max()
    # Of quantized rows the median: a router between two equal experts may choose the other one.
    worst = errors.max() if MODELS[name].format == "fp32" else np.median(errors)
    assert worst < TOLERANCE[MODELS[name].format]


def logits_with(bundle: Bundle, executor: str, threads: int) -> Rows:
    stage = CpuStage.load(
        bundle, LayerRange(0, 2), threads=threads, kv_budget_bytes=1 << 20, executor=executor
    )
    stage.open(SessionId(1), 40)
    return stage.run(Batch((span(1, 0, range(40)),), None))


@pytest.mark.parametrize("name", ["int4", "experts-int8", "dense"])
def test_the_number_of_threads_changes_no_bit(bundles: dict[str, Bundle], executor: str, name: str) -> None:
    one = logits_with(bundles[name], executor, 1)
    for threads in (2, 3):
        assert np.array_equal(one, logits_with(bundles[name], executor, threads))


def test_onnx_runtime_shares_one_pool_of_many_threads(bundles: dict[str, Bundle]) -> None:
    one = logits_with(bundles["int4"], "onnx", 1)
    # More threads come from one pool of the process, which then all sessions must use: a process of its own.
    script = f"""
import sys
from tests.engine.test_engine_cpu_stage import Bundle, logits_with
bundle = Bundle.open({str(bundles["int4"].path)!r})
sys.stdout.buffer.write(logits_with(bundle, "onnx", 5).tobytes() + logits_with(bundle, "onnx", 2).tobytes())
"""
    shared = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert shared.stdout == one.tobytes() * 2
    assert b"5 threads; 2 cannot be had" in shared.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("hidden", "more")}, "takes 1 values and gives 3; the manifest says 2 and 3"),
        ({"graph": "norm"}, "could not load layers.0 operations 0-3"),
    ],
)
def test_a_segment_that_does_not_fit_its_manifest_is_refused(
    bundles: dict[str, Bundle], change: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["dense"]
    block = bundle.manifest.layers[0]
    if "graph" in change:  # bytes that are no graph
        change = {"graph": bundle.manifest.tensors["layers.0.norm1"].parts["data"]}
    segment = replace(block.segments[0], **change)
    block = replace(block, segments=(segment, *block.segments[1:]))
    with pytest.raises(EngineError, match=message):
        LoadedBlock(bundle, block, "onnx", threads=1)
    assert capfd.readouterr().out == ""


def test_embedding_and_experts_stay_mapped(load: Load, tmp_path: Path) -> None:
    """Weights the segments repack leave resident memory; experts and embedding rows come in as they are used."""
    bundle = build_tiny_bundle(tmp_path / "bundle", TinyModel(layers=1, experts=4))
    stage = load(bundle, LayerRange(0, 0))
    stage.open(SessionId(1), 4)
    assert stage.weight_bytes == bundle.manifest.stage_weight_bytes(0, 0)
    first = stage.run(Batch((Span(SessionId(1), 0, (1, 2), 1),), None))
    bundle.close()  # views stay valid: the stage holds them
    stage.drop(SessionId(1))
    stage.open(SessionId(1), 4)
    assert np.array_equal(first, stage.run(Batch((Span(SessionId(1), 0, (1, 2), 1),), None)))
