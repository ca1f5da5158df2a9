"""The estimate of resident weights is what loading really costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.engine.memory import resident_weight_bytes
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

MIB = 1 << 20
STEP_BYTES = MIB // 2  # a page of KV and the scratch memory of one row
SCRIPT = """
import os, sys
from pathlib import Path
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
tiny, bundle = (Bundle.open(path) for path in sys.argv[1:3])
options = {"threads": 1, "kv_budget_bytes": 1 << 20, "executor": sys.argv[3]}
CpuStage.load(tiny, LayerRange(0, 0), **options)  # what the first session costs anyway
before = rss()
stage = CpuStage.load(bundle, LayerRange(0, 1), **options)
if sys.argv[3] == "native":  # a row through every matrix, so that mapped ones are touched
    stage.open(SessionId(1), 1)
    stage.run(Batch((Span(SessionId(1), 0, (1,), 1),), None))
print(rss() - before)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", TinyModel(layers=1))


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(
        layers=2, hidden=512, heads=8, kv_heads=8, head_dim=64, intermediate=2048, format=request.param
    )
    return build_tiny_bundle(tmp_path_factory.mktemp("memory") / "bundle", model)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("executor", ["native", "onnx"])
def test_the_estimate_holds(tiny: Bundle, bundle: Bundle, executor: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny.path, bundle.path, executor],
        capture_output=True,
        check=True,
        text=True,
    )
    measured, estimate = int(run.stdout), resident_weight_bytes(bundle.manifest, 0, 1, executor)
    assert executor == "native" or estimate > bundle.manifest.stage_weight_bytes(0, 1)
    assert 0.6 * estimate < measured < 1.1 * estimate + STEP_BYTES, (measured / MIB, estimate / MIB)


def test_experts_and_a_tied_embedding_count_once_where_they_are_mapped(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "bundle", TinyModel(layers=2, experts=4, format="int8"))
    whole = resident_weight_bytes(bundle.manifest, 0, 1, "native")
    parts = [resident_weight_bytes(bundle.manifest, layer, layer, "native") for layer in (0, 1)]
    assert whole == sum(parts)
    experts = bundle.manifest.tensors["layers.0.experts"]
    assert parts[0] > experts.shape[0] * experts.expert_stride_bytes
