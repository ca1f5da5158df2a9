"""The demo model, exported as users export it: the executor against the reference, and any cut against none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Rows
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.probe import probe
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.sdk.cluster import demo_bundle
from exporters.export import ExportOptions, export_bundle
from tests.support.stages import Pipeline, span, ticking

CHECKPOINT = Path(__file__).parents[2] / "examples" / "models" / "moe"
PROMPT = (
    "def read_lines(path):\n    with open(path) as file:\n        for line in file:\n            yield line"
)


Load = Callable[[Bundle, LayerRange], CpuStage]


@pytest.fixture(scope="module", params=["native", "onnx"])
def load(request: pytest.FixtureRequest) -> Load:
    return lambda bundle, layers: CpuStage.load(
        bundle, layers, threads=1, kv_budget_bytes=8 << 20, executor=request.param
    )


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if request.param == "int8":
        return Bundle.open(demo_bundle())  # as it ships
    path = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle(CHECKPOINT, path, ExportOptions(weights=request.param, calibration_tokens=64))
    return Bundle.open(path)


def prompt_ids(bundle: Bundle) -> list[int]:
    ids: list[int] = Tokenizer.from_buffer(bundle.tokenizer_json()).encode(PROMPT).ids
    return ids


def greedy(pipeline: Pipeline, session: int, prompt: list[int], count: int) -> tuple[list[int], Rows]:
    """Ids and logits of `count` greedy tokens after a prompt fed in one piece."""
    pipeline.open(session, len(prompt) + count)
    logits = [pipeline.run(span(session, 0, prompt, 1))[0]]
    ids = [int(np.argmax(logits[0]))]
    while len(ids) < count:
        logits.append(pipeline.run(span(session, len(prompt) + len(ids) - 1, ids[-1:]))[0])
        ids.append(int(np.argmax(logits[-1])))
    pipeline.drop(session)
    return ids, np.stack(logits)


def test_agrees_with_the_reference(load: Load, bundle: Bundle) -> None:
    ids = prompt_ids(bundle)
    results = []
    for make in (load, ReferenceStage):
        pipeline = Pipeline.load(bundle, make)
        pipeline.open(1, len(ids))
        results.append(pipeline.run(span(1, 0, ids)))
    fast, reference = results
    errors = np.abs(fast - reference).max(axis=1) / np.abs(reference).max()
    if bundle.manifest.model.weights == "fp32":
        assert errors.max() < 1e-3
    else:
        assert np.median(errors) < 0.05
        assert np.mean(np.argmax(fast, axis=1) == np.argmax(reference, axis=1)) > 0.85


def test_every_cut_gives_the_same_bits(load: Load, bundle: Bundle) -> None:
    layers = bundle.manifest.num_layers
    prompt = prompt_ids(bundle)
    whole = greedy(Pipeline.load(bundle, load), 1, prompt, 6)
    cuts = [(first,) for first in range(1, layers)] + list(combinations(range(1, layers), 2))[::3]
    for boundaries in cuts:
        ids, logits = greedy(Pipeline.load(bundle, load, *boundaries), 1, prompt, 6)
        assert ids == whole[0], boundaries
        assert np.array_equal(logits, whole[1]), boundaries


def test_rows_are_invariant_here(load: Load, bundle: Bundle) -> None:
    result = probe(load(bundle, LayerRange(0, bundle.manifest.num_layers - 1)), clock=ticking(1e-3))
    assert result.row_invariant, result.why_not
