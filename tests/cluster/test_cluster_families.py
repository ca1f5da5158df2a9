"""Every family over three real agents: the 64 greedy tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime import DeviceSpec, LocalCluster
from exporters.export import ExportOptions, export_bundle
from tests.support import tiny_checkpoints
from tests.support.transformers_oracle import NEW_TOKENS, PROMPT, oracle

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.export,
    # transformers and torch warn about themselves while they are imported
    pytest.mark.filterwarnings("default"),
]

DEVICES = [DeviceSpec(name=name, memory="512MiB", threads=1) for name in ("phone", "laptop", "mini-pc")]


@pytest.mark.parametrize("family", tiny_checkpoints.GENERATORS)
def test_three_agents_say_what_transformers_says(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    checkpoint = tiny_checkpoint(family)
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle, ExportOptions(weights="fp32", calibration_tokens=96))
    _, expected_ids = oracle(checkpoint)
    with LocalCluster(bundle, devices=DEVICES, split="even") as cluster:
        assert sum(device["layers"] is not None for device in cluster.devices()) == 3
        result = cluster.client().generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    assert list(result.token_ids) == expected_ids
