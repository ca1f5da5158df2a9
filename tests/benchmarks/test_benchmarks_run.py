"""Every benchmark of the serving engine, on the tiny model, as people start it: real processes, and the JSON that is
the contract. The other programs take part where they are built."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.environment import ROOT, VARIABLE

pytestmark = pytest.mark.cluster

HAVE_PEERS = VARIABLE in os.environ or (ROOT / ".peers" / ".installed").exists()
FIGURES = {
    "decode": (set(), {"decode_vs_llamacpp"}),
    "prefill": ({"ttft_split_vs_solo", "prefix_ttft_ratio"}, {"prefill_vs_llamacpp"}),
    "pipeline": (
        {
            "pipeline_vs_solo",
            "four_sessions_vs_solo",
            "hop_ms_p50",
            "wan_efficiency",
            "plan_error_max",
            "agent_overhead_mib",
        },
        {"pipeline_vs_llamacpp_rpc"},
    ),
    "load": (
        {
            "itl_p99_during_prefill_vs_alone",
            "starved",
            "offered_share",
            "overload_refused",
            "overload_starved_once_begun",
        },
        set(),
    ),
}
MORE = {"load": ["--only", "latency", "open", "overload"]}  # overload is no part of a run that names none


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmarks keep what they make in `.bench/` of the directory they run in: here an empty one."""
    return tmp_path_factory.mktemp("benchmarks")


def run(directory: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("name", FIGURES)
def test_a_benchmark_runs_and_says_its_figures(directory: Path, name: str) -> None:
    ours, with_peers = FIGURES[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--model", "tiny", "--json", *MORE.get(name, ())]
    done = run(directory, command if HAVE_PEERS else [*command, "--no-peers"])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    figures = json.loads(done.stdout)
    for key in ours | (with_peers if HAVE_PEERS else set()):
        assert math.isfinite(figures[key]), key
    if not HAVE_PEERS:
        assert all(figures[key] is None for key in with_peers)
    if name == "pipeline":
        assert figures["plans"] >= 8
        assert figures["wan_efficiency"] < 1.05  # the delay was really on the way


def test_halves_of_the_experts_on_two_agents_give_the_same_ids(directory: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.flash_halves", "--small", "--threads", "1", "--json"]
    done = run(directory, command)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["identical"] is True
    assert figures["tokens_compared"] > 0
    assert figures["held_shares"] == [0.5, 0.5]
    assert math.isfinite(figures["two_agents_ratio"])
