"""Real processes: two pipelines at once, and one goes on with what the other began."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import Client, DeviceSpec, LocalCluster
from edge_runtime.errors import UsageError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

PROMPTS = ("import os\n\n\ndef main(", "class Reader:\n    def ")
OPTIONS = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def pair(demo_bundle: Path) -> Iterator[LocalCluster]:
    devices = [DeviceSpec(name=name) for name in ("a", "b")]
    with LocalCluster(demo_bundle, devices=devices, replicas=2) as cluster:
        yield cluster


def stages(cluster: LocalCluster) -> list[list[str]]:
    return [[part[0] for part in plan["stages"]] for plan in cluster.status()["plans"]]


def test_two_replicas_serve_at_once_and_one_takes_over_when_the_other_is_killed(pair: LocalCluster) -> None:
    assert sorted(stages(pair)) == [["a"], ["b"]]
    status = pair.status()
    assert status["plan"] == status["plans"][0]
    assert len({plan["lease"] for plan in status["plans"]}) == 2
    assert {device["state"] for device in pair.devices()} == {"serving"}
    assert {device["name"]: device["pid"] for device in pair.devices()} == pair.pids
    client = pair.client()
    undisturbed = [client.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]

    half_way = threading.Barrier(3, timeout=60)
    found: dict[int, tuple[int, ...]] = {}

    def read(index: int) -> None:
        ids: list[int] = []
        with Client(pair.url, api_key=pair.api_key) as own, own.stream(PROMPTS[index], **OPTIONS) as stream:
            for token in stream:
                ids.append(token.id)
                if len(ids) == 40:
                    half_way.wait()  # both are running
                    half_way.wait()  # one of the devices is dead
        found[index] = tuple(ids)

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(PROMPTS))]
    for reader in readers:
        reader.start()
    half_way.wait()
    os.kill(pair.pids["b"], signal.SIGKILL)
    half_way.wait()
    for reader in readers:
        reader.join(60)
    assert [found[index] for index in range(len(PROMPTS))] == undisturbed
    assert stages(pair) == [["a"]]
    leases = [plan["lease"] for plan in pair.status()["plans"]]
    assert leases == [plan["lease"] for plan in status["plans"] if plan["stages"][0][0] == "a"]

    pair.restart("b")
    deadline = time.monotonic() + 20
    while stages(pair) != [["a"], ["b"]] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stages(pair) == [["a"], ["b"]]  # it is a replica again


def test_a_number_of_replicas_is_a_number(demo_bundle: Path) -> None:
    with pytest.raises(UsageError, match="replicas"):
        LocalCluster(demo_bundle, devices=[DeviceSpec(name="a")], replicas=0)
    with pytest.raises(UsageError, match="device name") as raised:
        DeviceSpec(name="a,b")
    assert "comma" in raised.value.hint
