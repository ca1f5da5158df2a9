"""One child process: its JSON lines, the end of its log, and its end.

Knows: starting, reading, stopping. Does not know: what the child is.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.config import child_environment
from edge_runtime.errors import EdgeRuntimeError, EngineError

STOP_SECONDS = 10.0
_POLL_SECONDS = 0.1
_TAIL_LINES = 15
_EXIT_SECONDS = 2.0  # from the end of its output to the end of the process

Event = dict[str, Any]


COMMANDS = ("-m", "edge_runtime.sdk.child")


class ChildProcess:
    """`python -m edge_runtime.cli` with these arguments, in a session of its own (Ctrl-C is the parent's business).

    `program`: what Python runs instead, if it watches its parent the same way.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log_path: Path, *, program: Sequence[str] = COMMANDS
    ) -> None:
        self.name = name
        self._log_path = log_path
        self._lines: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                # -P: a folder called `coordinator` in the caller's directory must not be taken for ours.
                [sys.executable, "-P", *program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=child_environment({"PYTHONUNBUFFERED": "1"}),
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name=f"{name}-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                self._lines.put(value)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for(
        self,
        wanted: Callable[[Event], bool],
        deadline: float,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Event:
        """The first of its JSON lines that is wanted. Raises EngineError with its last words if it ends instead."""
        while time.monotonic() < deadline:
            try:
                event = self._lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if event is None:
                self._wait(_EXIT_SECONDS)
                raise self.failure("ended")
            on_event(event)
            if wanted(event):
                return event
        raise self.failure("did not get ready in time")

    def check(self) -> None:
        """Raises EngineError if it has ended."""
        if not self.is_running:
            raise self.failure("ended")

    def failure(self, what: str) -> EdgeRuntimeError:
        code = self._process.poll()
        status = "" if code is None else f" with exit code {code}"
        tail = self.log_tail()
        said = f"; its last words:\n{tail}" if tail else ""
        return EngineError(
            f"{self.name} {what}{status}{said}",
            hint="`edge-runtime doctor` checks this machine",
            code="process",
        )

    def log_tail(self) -> str:
        try:
            lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join("  " + line for line in lines[-_TAIL_LINES:])

    def _wait(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def terminate(self) -> None:
        """Ask it to stop; `close` waits for it."""
        if self.is_running:
            self._process.terminate()

    def close(self, deadline: float | None = None) -> None:
        """Stop it and free its pipes. Idempotent."""
        self.terminate()
        left = STOP_SECONDS if deadline is None else max(0.1, deadline - time.monotonic())
        if not self._wait(left):
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
