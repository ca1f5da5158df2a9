"""Wire formats over real devices: the same ids on one, two and three of them, and a class that says which."""

from __future__ import annotations

import pytest

from edge_runtime import DeviceSpec, LocalCluster
from edge_runtime.sdk.cluster import DEMO

pytestmark = pytest.mark.cluster

SPLITS = (((0, 5),), ((0, 2), (3, 5)), ((0, 0), (1, 3), (4, 5)))


def test_keys_and_values_in_bytes_over_two_devices() -> None:
    texts = []
    for split in SPLITS[:2]:
        devices = [DeviceSpec(f"device-{number}") for number in range(len(split))]
        with LocalCluster(DEMO, devices=devices, split=split, kv="int8") as cluster:
            texts.append(cluster.client().generate("def read(", max_tokens=60, temperature=0.8, seed=1).text)
            assert any("keys and values in int8" in reason for reason in cluster.status()["plan"]["reasons"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_cuts_change_no_id(wire: str) -> None:
    texts = set()
    for split in SPLITS:
        devices = [DeviceSpec(f"device-{number}") for number in range(len(split))]
        with LocalCluster(DEMO, devices=devices, split=split, wire=wire) as cluster:
            client = cluster.client()
            texts.add(
                tuple(
                    client.generate(prompt, max_tokens=60, temperature=0.8, seed=seed).text
                    for seed, prompt in enumerate(("def read(", "class Tree:\n"))
                )
            )
            plan = cluster.status()["plan"]
            assert any(f"rounded to {wire}" in reason for reason in plan["reasons"])
    assert len(texts) == 1
