"""A torch agent in a real cluster: alone, and as one stage beside an agent of another class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_runtime import DeviceSpec, LocalCluster
from edge_runtime.sdk.process import ChildProcess

pytestmark = pytest.mark.cluster

PROMPT = "def read_lines(path):\n"


class TorchCluster(LocalCluster):
    """Devices named torch… run the torch executor."""

    def _agent_process(self, name: str, arguments: list[str], log_path: Path) -> ChildProcess:
        flags = ["--executor", "torch"] if name.startswith("torch") else []
        return super()._agent_process(name, [*arguments, *flags], log_path)


def generate(bundle: Path, names: Sequence[str], split: Sequence[tuple[int, int]]) -> tuple[list[int], str]:
    """Greedy and sampled ids, and what the plan says of itself."""
    devices = [DeviceSpec(name=name, memory="2GiB", threads=1) for name in names]
    with TorchCluster(bundle, devices=devices, split=split) as cluster:
        client = cluster.client()
        ids: list[int] = []
        for temperature in (0.0, 0.8):
            result = client.generate(PROMPT, max_tokens=24, temperature=temperature, seed=7)
            assert result.finish_reason in ("length", "stop")
            ids += result.token_ids
        return ids, "\n".join(cluster.status()["plan"]["reasons"])


def test_torch_agents_serve_alone_and_cut_in_two(demo_bundle: Path) -> None:
    alone, reasons = generate(demo_bundle, ["torch"], [(0, 5)])
    cut, cut_reasons = generate(demo_bundle, ["torch-a", "torch-b"], [(0, 2), (3, 5)])
    assert cut == alone
    for said in (reasons, cut_reasons):
        assert "numeric classes" not in said
        assert "row-invariant" not in said


def test_a_torch_agent_works_beside_one_of_another_class(demo_bundle: Path) -> None:
    ids, reasons = generate(demo_bundle, ["torch", "other"], [(0, 2), (3, 5)])
    assert "2 numeric classes: tokens depend on which layers are where" in reasons
    assert "layers 0-2 are computed by torch-" in reasons
    assert re.search("layers 3-5 are computed by (native|onnx)", reasons)
    again, _ = generate(demo_bundle, ["torch", "other"], [(0, 2), (3, 5)])
    assert again == ids
