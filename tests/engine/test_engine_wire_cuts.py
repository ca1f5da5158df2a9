"""A wire format belongs to the class, not to the cuts: the same bits however a model is cut, chunked and carried."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Batch, Rows, Span, StageFormats
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.engine.wire import WIRES, packed, unpacked
from edge_runtime.errors import EngineError
from edge_runtime.sdk.cluster import demo_bundle
from tests.support.stages import Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

IDS = [5, 17, 42, 99, 3, 7, 150, 11, 60, 33, 34, 35]
PROMPTS = (
    "def main(",
    "import os\n",
    "class Node:\n    def __init__(self",
    "for i in range(10):\n",
    "# read a file\n",
)


class Carried(Pipeline):
    """Rows go from stage to stage as frames do."""

    wire = "fp32"

    def run(self, *spans: Span) -> Rows:
        rows: Rows | None = None
        for stage in self.stages:
            rows = stage.run(Batch(tuple(spans), rows))
            if stage is not self.stages[-1]:
                rows = unpacked(packed(rows, self.wire), self.wire, len(rows), rows.shape[1])
                assert rows is not None
        assert rows is not None
        return rows


def pipeline(bundle: Bundle, wire: str, *cuts: int, executor: str = "auto") -> Carried:
    def make(bundle: Bundle, layers: LayerRange) -> CpuStage:
        formats = StageFormats(wire=wire)
        return CpuStage.load(
            bundle, layers, threads=1, kv_budget_bytes=64 << 20, executor=executor, formats=formats
        )

    found = Carried.load(bundle, make, *cuts)
    found.wire = wire
    return found


@pytest.fixture(scope="module", params=["fp32", "int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=3, format=request.param)
    return build_tiny_bundle(tmp_path_factory.mktemp("wire") / "bundle", model)


@pytest.mark.parametrize("wire", WIRES)
def test_cuts_and_chunks_change_no_bit(bundle: Bundle, wire: str) -> None:
    whole = logits_alone(pipeline(bundle, wire), 1, IDS)
    for cuts in ((1,), (2,), (1, 2)):
        parts = pipeline(bundle, wire, *cuts)
        np.testing.assert_array_equal(logits_alone(parts, 1, IDS), whole)
        parts.open(2, len(IDS))
        chunked = [parts.run(span(2, 0, IDS[:7])), parts.run(span(2, 7, IDS[7:]))]
        np.testing.assert_array_equal(np.concatenate(chunked), whole)


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_a_wire_format_is_part_of_the_class_and_of_the_numbers(bundle: Bundle, wire: str) -> None:
    there, plain = pipeline(bundle, wire), pipeline(bundle, "fp32")
    assert there.stages[0].numeric_class == plain.stages[0].numeric_class.replace("wire:fp32", f"wire:{wire}")
    assert not np.array_equal(logits_alone(there, 1, IDS), logits_alone(plain, 1, IDS))


def test_the_reference_rounds_in_the_same_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    """fp32 weights, so that the executors differ by sums alone."""
    bundle = build_tiny_bundle(tmp_path_factory.mktemp("wire") / "plain", TinyModel(layers=3))
    for wire in ("fp16", "int8"):
        reference = Pipeline.load(bundle, functools.partial(ReferenceStage, wire=wire))
        expected = logits_alone(reference, 1, IDS)
        got = logits_alone(pipeline(bundle, wire), 1, IDS)
        step = {"fp16": 2e-3, "int8": 4e-2}[wire]
        assert np.abs(got - expected).max() <= step * np.abs(expected).max()


def test_a_residual_without_room_is_an_error_and_not_garbage(bundle: Bundle) -> None:
    stage = CpuStage.load(
        bundle, LayerRange(1, 2), threads=1, kv_budget_bytes=1 << 20, formats=StageFormats(wire="fp16")
    )
    stages = Pipeline([stage])
    stages.open(1, 4)
    rows = np.full((1, bundle.manifest.model.hidden_size), 1e6, np.float32)
    with pytest.raises(EngineError, match="--wire fp32") as caught:
        stage.run(Batch((span(1, 0, [3]),), rows))
    assert caught.value.code == "wire_overflow"
    rows[:] = 1
    stage.run(Batch((span(1, 0, [3]),), rows))  # the session holds nothing of what failed


@pytest.mark.parametrize("executor", ["native", "onnx"])
def test_demo_model_top_1_agreement(executor: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Along what fp32 generates: how often each format has the same best id. Figures: docs/transport.md."""
    demo = Bundle.open(demo_bundle())
    tokenizer = Tokenizer.from_str(demo.slice_bytes("tokenizer").tobytes().decode())
    stages = {wire: pipeline(demo, wire, executor=executor) for wire in WIRES}
    same = dict.fromkeys(WIRES, 0)
    total = 0
    for number, prompt in enumerate(PROMPTS):
        ids = list(tokenizer.encode(prompt).ids)
        for each in stages.values():
            each.open(number, len(ids) + 40)
        best = {wire: int(each.run(span(number, 0, ids, 1))[0].argmax()) for wire, each in stages.items()}
        for row in range(len(ids), len(ids) + 40):
            total += 1
            for wire in WIRES:
                same[wire] += best[wire] == best["fp32"]
            token = best["fp32"]
            best = {
                wire: int(each.run(span(number, row, [token]))[0].argmax()) for wire, each in stages.items()
            }
    with capsys.disabled():
        shares = ", ".join(f"{wire} {count / total:.3f}" for wire, count in same.items())
        sys.stdout.write(f"\n{executor}: same best id as fp32, of {total}: {shares}\n")
    assert same["fp32"] == total
    assert same["fp16"] >= 0.97 * total
    assert same["int8"] >= 0.85 * total
