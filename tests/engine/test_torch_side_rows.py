"""Side rows on the torch executor: on the CPU and on Triton's programs the bits of the same rows on a chain."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.side_rows import SideRows
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic, choose
from edge_runtime.engine.torch_stage.stage import TorchStage
from tests.support.stages import Pipeline, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle
from tests.support.trees import logits_of_sides, random_sides, with_sides
from tests.support.triton_device import DEVICE, products_in_order

VOCAB = 200
KV_BYTES = 8 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(window=5, softcap=20.0, qk_norm=False)
    return build_tiny_bundle(tmp_path_factory.mktemp("bundles") / "bundle", model)


def load_with(arithmetic: Arithmetic) -> Callable[[Bundle, LayerRange], TorchStage]:
    """A stage whose pages are NaN before rows are written."""

    def load(bundle: Bundle, layers: LayerRange) -> TorchStage:
        stage = TorchStage.load(bundle, layers, kv_budget_bytes=KV_BYTES, arithmetic=arithmetic)
        stage._pages.tensor[:] = torch.nan
        return stage

    return load


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline.load(bundle, load_with(choose("fp32", device="cpu")), 1)


def compare(pipeline: Pipeline, before: list[int], ids: list[int], sides: SideRows) -> None:
    """A step with side rows, and then a row after it."""
    for session in (1, 2, 3, 9):
        pipeline.drop(session)
    one = with_sides(span(1, len(before), ids), sides)
    expected = logits_of_sides(pipeline, 2, before, one)
    pipeline.open(9, 100)
    chain = pipeline.run(span(9, 0, [*before, *ids, 7], len(ids) + 1))
    pipeline.open(3, 10)
    mate = pipeline.run(span(3, 0, [5, 6]))
    pipeline.drop(3)
    pipeline.open(1, 100)
    pipeline.open(3, 10)
    pipeline.run(span(1, 0, before, 0))
    used = [stage._pages.table.used_pages for stage in pipeline.stages]  # type: ignore[attr-defined]
    got = pipeline.run(span(3, 0, [5, 6]), one)
    assert np.array_equal(got[:2], mate)
    assert np.array_equal(got[2 : 2 + len(ids)], chain[:-1])
    assert len(got) == 2 + len(ids) + len(sides)
    assert not len(sides) or np.array_equal(got[2 + len(ids) :], expected)
    assert np.array_equal(pipeline.run(span(1, len(before) + len(ids), [7])), chain[-1:])
    new = 1 + -(-(len(before) + len(ids) + 1) // 32) - -(-len(before) // 32)
    assert [stage._pages.table.used_pages for stage in pipeline.stages] == [n + new for n in used]  # type: ignore[attr-defined]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_on_the_cpu(pipeline: Pipeline, seed: int) -> None:
    rng = random.Random(seed)
    before = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
    ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))]
    compare(pipeline, before, ids, random_sides(rng, len(before), len(ids), 4, VOCAB))


@pytest.mark.export
def test_on_triton(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    products_in_order(monkeypatch)
    make = load_with(Arithmetic(torch.device(DEVICE), "triton", "bf16"))
    compare(Pipeline.load(bundle, make, 1), [1, 2, 3, 4], [5, 6], SideRows((8, 9, 10), (3, ~0, 5)))
