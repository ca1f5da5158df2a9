"""The demo model on the torch executor: the reference's tokens, alone and with other sessions in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.engine.torch_stage.arithmetic import choose
from edge_runtime.engine.torch_stage.stage import TorchStage
from edge_runtime.sdk.cluster import demo_bundle
from tests.support.stages import Pipeline, span

PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n", "import os\n\n")
TOKENS = 64


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(demo_bundle())


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[list[int]]:
    """The first prompt's 64 tokens, and fewer of the others': the reference is slow."""
    pipeline = Pipeline.load(bundle, ReferenceStage)
    lengths = (TOKENS, 12, 12)
    return [
        greedy(pipeline, i, ids, n) for i, (ids, n) in enumerate(zip(prompts(bundle), lengths, strict=True))
    ]


def prompts(bundle: Bundle) -> list[list[int]]:
    tokenizer = Tokenizer.from_buffer(bundle.tokenizer_json())
    return [list(tokenizer.encode(text).ids) for text in PROMPTS]


def on_cpu(bundle: Bundle, layers: LayerRange) -> TorchStage:
    arithmetic = choose(bundle.manifest.model.weights, device="cpu")
    return TorchStage.load(bundle, layers, kv_budget_bytes=8 << 20, arithmetic=arithmetic)


def greedy(pipeline: Pipeline, session: int, prompt: Sequence[int], count: int) -> list[int]:
    pipeline.open(session, len(prompt) + count)
    ids = [int(np.argmax(pipeline.run(span(session, 0, prompt, 1))[0]))]
    while len(ids) < count:
        ids.append(int(np.argmax(pipeline.run(span(session, len(prompt) + len(ids) - 1, ids[-1:]))[0])))
    pipeline.drop(session)
    return ids


def test_greedy_tokens_are_the_references(bundle: Bundle, expected: list[list[int]]) -> None:
    assert greedy(Pipeline.load(bundle, on_cpu), 1, prompts(bundle)[0], TOKENS) == expected[0]


def test_sessions_that_come_and_go_do_not_disturb_each_other(
    bundle: Bundle, expected: list[list[int]]
) -> None:
    """Three sessions on two stages, each a step behind the one before; one is dropped and begins again."""
    pipeline = Pipeline.load(bundle, on_cpu, 2)
    texts = prompts(bundle)
    got: dict[int, list[int]] = {}
    for step in range(18):
        spans = []
        for s, text in enumerate(texts):
            if step == 2 * s or (s == 1 and step == 5):
                pipeline.drop(s)
                pipeline.open(s, len(text) + 20)
                got[s] = []
                spans.append(span(s, 0, text, 1))
            elif s in got:
                spans.append(span(s, len(text) + len(got[s]) - 1, got[s][-1:]))
        for one, logits in zip(spans, pipeline.run(*spans), strict=True):
            got[int(one.session)].append(int(np.argmax(logits)))
    for s, ids in got.items():
        count = min(len(ids), len(expected[s]))
        assert count >= 12
        assert ids[:count] == expected[s][:count]
