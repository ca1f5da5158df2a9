"""Real processes: a device with its experts on flash, and others with some of them in memory."""

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
RUNNER, HOLDERS = "runner", ("first", "second")
SOME = "2MiB"  # of the 7.9 MiB of experts: not enough for all of them in three devices' memory


@pytest.fixture(scope="module")
def helped(demo_bundle: Path) -> Iterator[LocalCluster]:
    devices = [DeviceSpec(name=name, expert_cache=SOME) for name in (RUNNER, *HOLDERS)]
    with LocalCluster(demo_bundle, devices=devices, split="experts") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(demo_bundle: Path) -> Iterator[LocalCluster]:
    with LocalCluster(demo_bundle, devices=[DeviceSpec(name="alone")]) as cluster:
        yield cluster


def test_the_plan_has_all_on_flash_and_some_in_the_memory_of_others(helped: LocalCluster) -> None:
    plan = helped.status()["plan"]
    assert [name for name, _, _ in plan["stages"]] == [RUNNER]
    assert {name for name, _, _ in plan["holders"]} == set(HOLDERS)
    assert all(0 < size <= 2 << 20 for _, _, size in plan["holders"])
    assert any("flash alone" in reason for reason in plan["reasons"])


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ids_are_those_of_one_device(helped: LocalCluster, alone: LocalCluster, options) -> None:
    expected = alone.client().generate(PROMPT, **options)
    assert helped.client().generate(PROMPT, **options).token_ids == expected.token_ids


def test_a_holder_killed_in_the_middle_of_a_stream_leaves_no_trace(
    helped: LocalCluster, alone: LocalCluster
) -> None:
    expected = alone.client().generate(PROMPT, **GREEDY).token_ids
    before = helped.status()["plan"]
    ids: list[int] = []
    with helped.client() as client, client.stream(PROMPT, **GREEDY) as stream:
        for token in stream:
            ids.append(token.id)
            if len(ids) == 20:
                os.kill(helped.pids[HOLDERS[0]], signal.SIGKILL)
    assert tuple(ids) == expected
    after = helped.status()["plan"]
    assert after["lease"] > before["lease"]
    assert HOLDERS[0] not in {name for name, _, _ in (*after["stages"], *after["holders"])}
    helped.restart(HOLDERS[0])
