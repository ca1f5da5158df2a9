"""Real processes: the same tokens whatever the cut, and whatever device is killed in the middle of a stream."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import Client, DeviceSpec, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROMPT = "import os\n\n\ndef main("
GREEDY = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 400, "ignore_eos": True}
CHOICES = pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def single(demo_bundle: Path) -> Iterator[Client]:
    with LocalCluster(demo_bundle, devices=[DeviceSpec(name="alone")]) as cluster:
        yield cluster.client()


@pytest.fixture(scope="module")
def three(demo_bundle: Path) -> Iterator[LocalCluster]:
    """Three stages, and a fourth device that is paired and stands by."""
    devices = [DeviceSpec(name=name) for name in ("a", "b", "c", "spare")]
    with LocalCluster(demo_bundle, devices=devices, split=[(0, 1), (2, 3), (4, 5)]) as cluster:
        yield cluster


@CHOICES
def test_three_devices_say_what_one_says(single: Client, three: LocalCluster, options) -> None:
    assert len(three.status()["plan"]["stages"]) == 3
    assert (
        three.client().generate(PROMPT, **options).token_ids == single.generate(PROMPT, **options).token_ids
    )


@CHOICES
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_device_leaves_no_trace_in_the_stream(
    single: Client, three: LocalCluster, options, stage
) -> None:
    undisturbed = single.generate(PROMPT, **options).token_ids
    before = three.status()["plan"]
    victim = before["stages"][stage][0]
    ids: list[int] = []
    with three.client().stream(PROMPT, **options) as stream:
        for token in stream:
            ids.append(token.id)
            if len(ids) == 50:
                os.kill(three.pids[victim], signal.SIGKILL)
    after = three.status()["plan"]
    assert tuple(ids) == undisturbed
    assert after["lease"] > before["lease"]
    assert [part[1:] for part in after["stages"]] == [part[1:] for part in before["stages"]]
    assert [part[0] for n, part in enumerate(after["stages"]) if n != stage] == [
        part[0] for n, part in enumerate(before["stages"]) if n != stage
    ]
    three.restart(victim)


def test_a_stopped_process_counts_as_lost_and_comes_back_as_a_spare(
    single: Client, three: LocalCluster
) -> None:
    """SIGSTOP: nothing is closed, only silence tells."""
    undisturbed = single.generate(PROMPT, **GREEDY).token_ids
    victim = three.status()["plan"]["stages"][1][0]
    ids: list[int] = []
    try:
        with three.client().stream(PROMPT, **GREEDY) as stream:
            for token in stream:
                ids.append(token.id)
                if len(ids) == 50:
                    os.kill(three.pids[victim], signal.SIGSTOP)
    finally:
        os.kill(three.pids[victim], signal.SIGCONT)
    assert tuple(ids) == undisturbed
    assert victim not in [part[0] for part in three.status()["plan"]["stages"]]
    three.wait_until_ready()


def test_a_revoked_member_is_cut_off_at_once_and_the_stream_goes_on(
    demo_bundle: Path, single: Client
) -> None:
    undisturbed = single.generate(PROMPT, **GREEDY).token_ids
    devices = [DeviceSpec(name=name) for name in ("a", "b", "c")]
    with LocalCluster(demo_bundle, devices=devices, split=[(0, 2), (3, 5)]) as cluster:
        client, ids = cluster.client(), []
        with client.stream(PROMPT, **GREEDY) as stream:
            for token in stream:
                ids.append(token.id)
                if len(ids) == 50:
                    client.revoke("a")
        assert tuple(ids) == undisturbed
        states = {device["name"]: device["state"] for device in cluster.devices()}
        assert states["a"] == "revoked"
        assert [part[0] for part in cluster.status()["plan"]["stages"]] == ["c", "b"]
