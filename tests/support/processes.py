"""`edge-runtime` commands as real processes, for tests that need what LocalCluster hides."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


class Process:
    """One command; its stderr goes to a file, JSON lines on stdout are not read."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._file = log.open("ab")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.cli", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=self._file,
        )

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)
        self._file.close()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait(20)
        finally:
            self.kill()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for(what, seconds: float = 60.0) -> Any:
    """The first true answer of `what()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"nothing came in {seconds:.0f} s")


class Site:
    """A coordinator and agents with their state below one directory."""

    def __init__(self, directory: Path, bundle: Path) -> None:
        self.directory = directory
        self.bundle = bundle
        self.processes: list[Process] = []
        self.ready: dict[str, Any] = {}

    def coordinator(self, *arguments: str, links: int = 4) -> Process:
        ready = self.directory / "ready.json"
        ready.unlink(missing_ok=True)
        fixed = ["--state", str(self.directory / "c"), "--ready-file", str(ready), "--join-links", str(links)]
        process = self._start("c.log", "coordinator", str(self.bundle), *fixed, *arguments)
        wait_for(lambda: ready.exists() or process.child.poll() is not None)
        self.ready = json.loads(ready.read_text())
        return process

    def agent(self, name: str, *arguments: str, link: str = "") -> Process:
        join = ["--join", link] if link else []
        state = [
            "--state",
            str(self.directory / name),
            "--name",
            name,
            "--memory",
            "512MiB",
            "--threads",
            "1",
        ]
        return self._start(f"{name}.log", "agent", *state, *join, *arguments)

    def _start(self, log: str, *arguments: str) -> Process:
        process = Process(self.directory / log, *arguments)
        self.processes.append(process)
        return process


@contextmanager
def site(directory: Path, bundle: Path) -> Iterator[Site]:
    found = Site(directory, bundle)
    try:
        yield found
    finally:
        for process in found.processes:
            process.kill()
