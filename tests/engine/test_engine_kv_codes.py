"""Keys and values in 8 bits: rows stay invariant, a quarter of the memory, and nearly the same tokens."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import StageFormats
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.kv_cache import KvCache, KvShape
from edge_runtime.engine.probe import probe
from edge_runtime.errors import EngineError
from edge_runtime.sdk.cluster import demo_bundle
from tests.support.stages import Pipeline, logits_alone, span, ticking
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

IDS = [5, 17, 42, 99, 3, 7, 150, 11, 60, 33, 34, 35] * 4
PROMPTS = (
    "def main(",
    "import os\n",
    "class Node:\n    def __init__(self",
    "for i in range(10):\n",
    "# read a file\n",
)
STEPS = 40


def load(bundle: Bundle, layers: LayerRange, kv: str = "int8") -> CpuStage:
    return CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=8 << 20, formats=StageFormats(kv=kv))


@pytest.fixture(scope="module", params=[0, 9])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=3, window=request.param)
    return build_tiny_bundle(tmp_path_factory.mktemp("codes") / "bundle", model)


def test_cuts_chunks_and_company_change_no_bit(bundle: Bundle) -> None:
    whole = logits_alone(Pipeline.load(bundle, load), 1, IDS)
    parts = Pipeline.load(bundle, load, 1, 2)
    parts.open(2, len(IDS))
    parts.open(3, len(IDS))
    chunks = [parts.run(span(2, 0, IDS[:37]))]
    both = parts.run(span(3, 0, IDS[:5]), span(2, 37, IDS[37:]))
    np.testing.assert_array_equal(np.concatenate([*chunks, both[5:]]), whole)
    np.testing.assert_array_equal(both[:5], whole[:5])


def test_the_class_says_so_and_the_probe_agrees(bundle: Bundle) -> None:
    stage = load(bundle, LayerRange(0, 2))
    assert "/kv:int8/" in stage.numeric_class
    assert probe(stage, clock=ticking(1e-3)).row_invariant
    plain = load(bundle, LayerRange(0, 2), "fp32")
    assert stage.kv_capacity_tokens > 3 * plain.kv_capacity_tokens  # 16 + 4 bytes a head instead of 64
    with pytest.raises(EngineError, match="KV format"):
        load(bundle, LayerRange(0, 2), "int4")


def test_freed_pages_read_as_zeros() -> None:
    shape = KvShape(layers=4, kv_heads=4, head_dim=60, format="int8")  # 64 KiB a page
    assert shape.page_bytes == 4 * 2 * 32 * 4 * 64
    cache = KvCache(shape, 2)
    cache.open(SessionId(1), 32)
    cache.append(SessionId(1), 0, 32)
    pages = list(cache.table.get(SessionId(1)).pages)
    cache.write_pages(pages, np.ones((1, 4, 2, 32, 4, 60), np.float32))
    assert cache.pool[pages].any()
    cache.drop(SessionId(1))
    assert not cache.pool.any()


def test_demo_model_top_1_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    """Along what fp32 generates: how often the best id is the same. The figure is in docs/engine.md."""
    demo = Bundle.open(demo_bundle())
    tokenizer = Tokenizer.from_str(demo.slice_bytes("tokenizer").tobytes().decode())
    layers = LayerRange(0, demo.manifest.num_layers - 1)
    plain, codes = Pipeline([load(demo, layers, "fp32")]), Pipeline([load(demo, layers)])
    same = 0
    for number, prompt in enumerate(PROMPTS):
        ids = list(tokenizer.encode(prompt).ids)
        for each in (plain, codes):
            each.open(number, len(ids) + STEPS)
        wanted, got = (each.run(span(number, 0, ids, 1))[0].argmax() for each in (plain, codes))
        for row in range(len(ids), len(ids) + STEPS):
            same += int(wanted == got)
            following = span(number, row, [int(wanted)])
            wanted, got = (each.run(following)[0].argmax() for each in (plain, codes))
    share = same / (STEPS * len(PROMPTS))
    with capsys.disabled():
        sys.stdout.write(
            f"\nKV in int8: same best id as with fp32 in {share:.3f} of {STEPS * len(PROMPTS)} steps\n"
        )
    assert share >= 0.95
