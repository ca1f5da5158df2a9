"""Real processes: devices that hold experts for another one change no id, and a killed one is done without."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import DeviceSpec, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROMPT = "import argparse\n\n\ndef main():\n"
GREEDY = {"max_tokens": 96, "temperature": 0.0, "ignore_eos": True}
SAMPLED = {"max_tokens": 96, "temperature": 0.7, "seed": 7, "ignore_eos": True}
RUNNER, HOLDERS = "runner", ("first", "second", "third")
LENT = "3MiB"  # of the 7.9 MiB of experts


@pytest.fixture(scope="module")
def shared(demo_bundle: Path) -> Iterator[LocalCluster]:
    """Any three of the four have room for all experts."""
    devices = [DeviceSpec(name=name, expert_cache=LENT) for name in (RUNNER, *HOLDERS)]
    with LocalCluster(demo_bundle, devices=devices, split="experts") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(demo_bundle: Path) -> Iterator[LocalCluster]:
    with LocalCluster(demo_bundle, devices=[DeviceSpec(name="alone")]) as cluster:
        yield cluster


def test_the_plan_says_who_holds_what(shared: LocalCluster) -> None:
    plan = shared.status()["plan"]
    assert plan["split"] == "experts"
    assert [name for name, _, _ in plan["stages"]] == [RUNNER]
    assert {name for name, _, _ in plan["holders"]} == set(HOLDERS)
    assert all(size <= 3 << 20 for _, _, size in plan["holders"])
    states = {device["name"]: (device["state"], device["reason"]) for device in shared.status()["devices"]}
    assert states[HOLDERS[0]][0] == "serving"
    assert f"experts for {RUNNER}" in states[HOLDERS[0]][1]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ids_are_those_of_one_device(shared: LocalCluster, alone: LocalCluster, options) -> None:
    expected = alone.client().generate(PROMPT, **options)
    assert shared.client().generate(PROMPT, **options).token_ids == expected.token_ids


@pytest.mark.parametrize("victim", [HOLDERS[0], RUNNER])
def test_a_device_killed_in_the_middle_of_a_stream_leaves_no_trace(
    shared: LocalCluster, alone: LocalCluster, victim: str
) -> None:
    expected = alone.client().generate(PROMPT, **GREEDY).token_ids
    before = shared.status()["plan"]
    ids: list[int] = []
    with shared.client() as client, client.stream(PROMPT, **GREEDY) as stream:
        for token in stream:
            ids.append(token.id)
            if len(ids) == 20:
                os.kill(shared.pids[victim], signal.SIGKILL)
    assert tuple(ids) == expected
    after = shared.status()["plan"]
    assert after["lease"] > before["lease"]
    assert victim not in {name for name, _, _ in (*after["stages"], *after["holders"])}
    shared.restart(victim)
