"""Every family against transformers: the same logits and the same 64 greedy tokens, from every form of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.reference import ReferenceStage
from exporters.export import ExportOptions, ExportReport, export_bundle
from tests.support import tiny_checkpoints
from tests.support.stages import Pipeline, span
from tests.support.transformers_oracle import NEW_TOKENS, PROMPT, oracle

pytestmark = [
    pytest.mark.export,
    # transformers and torch warn about themselves while they are imported
    pytest.mark.filterwarnings("default"),
]

TinyCheckpoint = Callable[[str], Path]
OPTIONS = ExportOptions(weights="fp32", calibration_tokens=96)
RELATIVE = 1e-3


Load = Callable[[Bundle, LayerRange], CpuStage]


@pytest.fixture(scope="module", params=["native", "onnx"])
def load(request: pytest.FixtureRequest) -> Load:
    return lambda bundle, layers: CpuStage.load(
        bundle, layers, threads=1, kv_budget_bytes=16 << 20, executor=request.param
    )


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ExportReport]:
    reports: dict[str, ExportReport] = {}

    def export(family: str) -> ExportReport:
        if family not in reports:
            target = tmp_path_factory.mktemp("bundles") / family
            reports[family] = export_bundle(tiny_checkpoint(family), target, OPTIONS)
        return reports[family]

    return export


def greedy(pipeline: Pipeline) -> tuple[np.ndarray, list[int]]:
    pipeline.open(1, len(PROMPT) + NEW_TOKENS)
    logits = pipeline.run(span(1, 0, PROMPT))
    ids: list[int] = []
    last = logits[-1]
    while len(ids) < NEW_TOKENS:
        ids.append(int(last.argmax()))
        last = pipeline.run(span(1, len(PROMPT) + len(ids) - 1, ids[-1:]))[-1]
    pipeline.drop(1)
    return logits, ids


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", tiny_checkpoints.GENERATORS)
def test_tokens_and_logits_are_those_of_transformers(
    load: Load, tiny_checkpoint: TinyCheckpoint, exported: Callable[[str], ExportReport], family: str
) -> None:
    expected_logits, expected_ids = oracle(tiny_checkpoint(family))
    bundle = Bundle.open(exported(family).path)
    for boundaries in ((), (1, 3)):
        logits, ids = greedy(Pipeline.load(bundle, load, *boundaries))
        assert relative_difference(logits, expected_logits) < RELATIVE
        assert ids == expected_ids
    assert len(set(expected_ids)) > 3  # a stuck model would agree with anything


@pytest.mark.parametrize("family", tiny_checkpoints.GENERATORS)
def test_the_reference_executor_agrees_too(
    tiny_checkpoint: TinyCheckpoint, exported: Callable[[str], ExportReport], family: str
) -> None:
    expected_logits, _ = oracle(tiny_checkpoint(family))
    pipeline = Pipeline.load(Bundle.open(exported(family).path), lambda b, r: ReferenceStage(b, r))
    pipeline.open(1, len(PROMPT))
    assert relative_difference(pipeline.run(span(1, 0, PROMPT)), expected_logits) < RELATIVE


@pytest.mark.parametrize("family", tiny_checkpoints.GENERATORS)
def test_the_measured_quality_of_exact_weights_is_perfect(
    exported: Callable[[str], ExportReport], family: str
) -> None:
    quality = exported(family).quality
    assert quality["top1_agreement"] == 1.0
    assert quality["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", tiny_checkpoints.GENERATORS)
@pytest.mark.parametrize("rewrite", [tiny_checkpoints.to_classic, tiny_checkpoints.to_fused])
def test_both_dialects_give_the_same_bundle(
    tiny_checkpoint: TinyCheckpoint,
    exported: Callable[[str], ExportReport],
    tmp_path: Path,
    family: str,
    rewrite: Callable[[Path, Path], Path],
) -> None:
    directory = rewrite(tiny_checkpoint(family), tmp_path / family)
    report = export_bundle(directory, tmp_path / "bundle", OPTIONS)
    ours, theirs = Bundle.open(report.path).manifest, Bundle.open(exported(family).path).manifest
    assert ours.tensors == theirs.tensors
    assert ours.slices == theirs.slices
    assert (ours.layers, ours.ropes, ours.model) == (theirs.layers, theirs.ropes, theirs.model)


def test_an_encoder_gives_the_mean_of_transformers_rows(
    load: Load, tiny_checkpoint: TinyCheckpoint, exported: Callable[[str], ExportReport]
) -> None:
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(tiny_checkpoint("bert"), add_pooling_layer=False).eval()
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0].numpy()
    expected = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    bundle = Bundle.open(exported("bert").path)
    pipeline = Pipeline.load(bundle, load, 2)
    pipeline.open(1, len(PROMPT))
    vector = pipeline.run(Span(span(1, 0, PROMPT).session, 0, tuple(PROMPT), causal=False))[0]
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert exported("bert").quality["cosine_min"] == pytest.approx(1.0, abs=1e-5)
