"""Real processes that keep pages for each other's requests: reuse changes no token, a dead device none either."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import DeviceSpec, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SHARED = list(range(40, 240)) * 2
GREEDY = {"temperature": 0.0, "max_tokens": 120, "ignore_eos": True}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 11} | {
    "max_tokens": 120,
    "ignore_eos": True,
}
CHOICES = pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def single(demo_bundle: Path) -> Iterator[LocalCluster]:
    with LocalCluster(demo_bundle, devices=[DeviceSpec(name="alone")]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(demo_bundle: Path) -> Iterator[LocalCluster]:
    devices = [DeviceSpec(name=name) for name in ("a", "b", "c", "spare")]
    with LocalCluster(demo_bundle, devices=devices, split=[(0, 1), (2, 3), (4, 5)]) as cluster:
        yield cluster


def hits(cluster: LocalCluster) -> float:
    request = urllib.request.Request(
        f"{cluster.url}/metrics", headers={"Authorization": f"Bearer {cluster.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "prefix_cache_hits_total{" in line)


def ids_of(
    cluster: LocalCluster, prompt: list[int], options: dict[str, object]
) -> tuple[tuple[int, ...], float]:
    """(generated ids, prompt tokens that were not computed)"""
    before = hits(cluster)
    ids = cluster.client().generate(prompt, **options).token_ids
    return ids, hits(cluster) - before


@CHOICES
def test_reuse_changes_no_token_whatever_the_cut(single: LocalCluster, three: LocalCluster, options) -> None:
    tails = ([1, 2, 3], [300, 301], [1, 2, 3])
    alone = [ids_of(single, [*SHARED, *tail], options) for tail in tails]
    split = [ids_of(three, [*SHARED, *tail], options) for tail in tails]
    assert [ids for ids, _ in alone] == [ids for ids, _ in split]
    assert alone[0][0] == alone[2][0]
    for found in (alone, split):
        assert found[1][1] == found[2][1] == len(SHARED) // 32 * 32


def test_the_next_turn_of_a_conversation_reuses_the_answer(single: LocalCluster) -> None:
    ids, _ = ids_of(single, [9, *SHARED], GREEDY)
    _, cached = ids_of(single, [9, *SHARED, *ids, 5, 6], GREEDY)
    assert cached == (1 + len(SHARED) + len(ids) - 1) // 32 * 32


@CHOICES
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_device_takes_kept_pages_with_it_and_nothing_else(
    single: LocalCluster, three: LocalCluster, options, stage
) -> None:
    prompt = [*SHARED, 100 + stage]
    undisturbed = single.client().generate(prompt, **options).token_ids
    assert ids_of(three, [*SHARED, 7], options)[0] == ids_of(single, [*SHARED, 7], options)[0]
    victim = three.status()["plan"]["stages"][stage][0]
    ids: list[int] = []
    with three.client().stream(prompt, **options) as stream:
        for token in stream:
            ids.append(token.id)
            if len(ids) == 30:
                os.kill(three.pids[victim], signal.SIGKILL)
    assert tuple(ids) == undisturbed
    again, cached = ids_of(three, prompt, options)
    assert again == undisturbed
    assert cached == len(prompt) // 32 * 32  # of the request that went on under the new plan
    three.restart(victim)


def test_many_requests_at_once_over_a_shared_prefix(single: LocalCluster, three: LocalCluster) -> None:
    """They compute the same pages side by side, and end up sharing them."""
    prompt = [77, *SHARED]
    client = three.client()
    streams = [client.stream(prompt, **SAMPLED | {"seed": seed}) for seed in range(6)]
    found = [[token.id for token in stream] for stream in streams]
    for seed, ids in enumerate(found):
        assert tuple(ids) == single.client().generate(prompt, **SAMPLED | {"seed": seed}).token_ids


def test_a_request_given_up_in_its_prompt_leaves_room_and_no_half_pages(
    single: LocalCluster, three: LocalCluster
) -> None:
    prompt = [55, *SHARED, *SHARED]
    for _ in range(3):
        stream = three.client().stream(prompt, **GREEDY)
        time.sleep(0.02)
        stream.close()
    undisturbed = single.client().generate(prompt, **GREEDY).token_ids
    assert three.client().generate(prompt, **GREEDY).token_ids == undisturbed
