"""LocalCluster and the demo with real processes, and what they leave behind: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edge_runtime import Client, DeviceSpec, LocalCluster
from edge_runtime.errors import BundleError, EngineError, TransportError, UsageError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROMPT = "def read(path):\n"
THREE = [DeviceSpec("phone", "512MiB"), DeviceSpec("laptop"), DeviceSpec("mini-pc")]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster("demo", devices=THREE, split="even") as cluster:
        yield cluster


def test_three_processes_share_the_layers(cluster: LocalCluster) -> None:
    assert len(set(cluster.pids.values())) == 3
    assert all(is_alive(pid) for pid in (*cluster.pids.values(), cluster.coordinator_pid))
    devices = {device["name"]: device for device in cluster.devices()}
    layers = sorted(devices[spec.name]["layers"] for spec in THREE)
    assert layers[0][0] == 0
    assert all(before[1] + 1 == after[0] for before, after in pairwise(layers))
    total = cluster.status()["model_weight_bytes"]
    assert all(device["weight_bytes"] <= 0.6 * total for device in devices.values())


def test_one_client_generates_streams_and_repeats_itself(cluster: LocalCluster) -> None:
    client = cluster.client()
    result = client.generate(PROMPT, max_tokens=24, temperature=0.8, seed=5)
    stream = client.stream(PROMPT, max_tokens=24, temperature=0.8, seed=5)
    assert tuple(token.id for token in stream) == result.token_ids
    assert stream.result.text == result.text
    assert result.timings.tokens_per_second > 0


async def test_an_asynchronous_program_uses_the_same_cluster(cluster: LocalCluster) -> None:
    async with cluster.async_client() as client:
        ids = [token.id async for token in client.stream(PROMPT, max_tokens=8, temperature=0)]
        assert tuple(ids) == (await client.generate(PROMPT, max_tokens=8, temperature=0)).token_ids


def test_a_killed_device_is_brought_back(cluster: LocalCluster) -> None:
    client = cluster.client()
    expected = client.generate(PROMPT, max_tokens=16, temperature=0).token_ids
    old = cluster.pids["laptop"]
    os.kill(old, signal.SIGKILL)
    cluster.restart("laptop")
    assert cluster.pids["laptop"] != old
    device = next(device for device in cluster.devices() if device["name"] == "laptop")
    assert device["state"] in ("serving", "ready", "excluded")
    assert client.generate(PROMPT, max_tokens=16, temperature=0).token_ids == expected


def test_a_device_can_be_added_and_stopped(cluster: LocalCluster) -> None:
    cluster.add(DeviceSpec("tablet", "512MiB"))
    assert "tablet" in {device["name"] for device in cluster.devices()}
    cluster.stop("tablet")
    assert "tablet" not in cluster.pids
    with pytest.raises(UsageError, match="already"):
        cluster.add(DeviceSpec("tablet"))
    with pytest.raises(UsageError, match="no device 'fridge'"):
        cluster.restart("fridge")


async def test_async_with_and_explicit_ranges_with_a_spare() -> None:
    devices = [DeviceSpec("a", expert_prediction="off"), DeviceSpec("b", reachable=False), DeviceSpec("c")]
    async with LocalCluster("demo", devices=devices, split=[(0, 3), (4, 5)]) as cluster:
        pids = cluster.pids
        said = command_line(pids["a"])
        assert said[said.index("--expert-prediction") + 1] == "off"
        stages = cluster.status()["plan"]["stages"]
        assert stages == [["a", 0, 3], ["b", 4, 5]]
        assert len(cluster.client().generate(PROMPT, max_tokens=4, temperature=0).token_ids) == 4
    assert eventually(lambda: not any(map(is_alive, pids.values())))


def test_nothing_is_left_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    pids: list[int] = []

    def fail_inside() -> None:
        with LocalCluster("demo", devices=[DeviceSpec("a")]) as cluster:
            pids.extend([*cluster.pids.values(), cluster.coordinator_pid])
            assert list(tmp_path.glob("edge-runtime-*"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
    assert not list(tmp_path.glob("edge-runtime-*"))


def test_a_cluster_that_is_not_running_says_so() -> None:
    with pytest.raises(UsageError, match="not running"):
        _ = LocalCluster("demo", devices=[DeviceSpec("a")]).coordinator_pid


def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = """
        import time
        from edge_runtime import DeviceSpec, LocalCluster
        with LocalCluster("demo", devices=[DeviceSpec("a")]) as cluster:
            print(*cluster.pids.values(), cluster.coordinator_pid, flush=True)
            time.sleep(600)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        parent.kill()
    assert eventually(lambda: not any(map(is_alive, pids)))


def test_a_start_that_fails_says_what_the_process_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a bundle") as caught:
        LocalCluster(tmp_path, devices=[DeviceSpec("a")]).start()
    assert "the coordinator ended with exit code 10" in caught.value.message


def test_a_model_that_does_not_fit_is_said_with_what_is_missing() -> None:
    with pytest.raises(TransportError, match=r"a: layers .* the budget of this device is 64\.0 MiB"):
        LocalCluster("demo", devices=[DeviceSpec("a", "64MiB")], start_timeout_seconds=6).start()


def test_wrong_arguments_are_refused_before_anything_starts() -> None:
    for arguments in ({"devices": []}, {"devices": [DeviceSpec("a"), DeviceSpec("a")]}):
        with pytest.raises(UsageError):
            LocalCluster("demo", **arguments)
    for split in ("odd", [(0, 1), (2, 5)], []):
        with pytest.raises(UsageError):
            LocalCluster("demo", devices=[DeviceSpec("a")], split=split)
    for wrong in (
        {"name": ""},
        {"name": "a/b"},
        {"name": "a", "memory": "lots"},
        {"name": "a", "threads": 0},
        {"name": "a", "expert_prediction": "always"},
    ):
        with pytest.raises(UsageError):
            DeviceSpec(**wrong)  # type: ignore[arg-type]


def test_a_missing_demo_bundle_has_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edge_runtime.sdk.cluster.__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(BundleError) as caught:
        LocalCluster("demo", devices=[DeviceSpec("a")])
    assert caught.value.hint


def test_the_demo_twice_in_an_empty_directory(tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        command = [sys.executable, "-m", "edge_runtime.cli", "demo", "--once", "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = answers
    assert set(first) == {
        "text",
        "token_ids",
        "devices",
        "model_weight_bytes",
        "predicted_tokens_per_second",
        "tokens_per_second",
    }
    assert first["token_ids"] == second["token_ids"]
    assert all(set(device) == {"name", "pid", "layers", "weight_bytes"} for device in first["devices"])
    assert len({device["pid"] for device in first["devices"]}) == 3
    assert max(d["weight_bytes"] for d in first["devices"]) <= 0.6 * first["model_weight_bytes"]
    assert "def " in first["text"]
    assert first["tokens_per_second"] > 0
    assert first["predicted_tokens_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_revoked_device_is_cut_off() -> None:
    with LocalCluster("demo", devices=[DeviceSpec("a"), DeviceSpec("b")], split="even") as cluster:
        with Client(cluster.url, api_key=cluster.api_key) as client:
            client.revoke("b")
        assert eventually(
            lambda: next(d for d in cluster.devices() if d["name"] == "b")["state"] == "revoked"
        )
        assert len(cluster.client().generate(PROMPT, max_tokens=4, temperature=0).token_ids) == 4
