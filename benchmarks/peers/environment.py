"""Where the programs we compare with live, and how to talk to one of them while it stays loaded.

`make bench-peers` builds `.peers/` from source packages; EDGE_BENCH_PEERS names another environment that has them.
Knows: environments and one process that answers JSON lines. Does not know: what is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.report import say

ROOT = Path(__file__).parents[2]
VARIABLE = "EDGE_BENCH_PEERS"
ANSWER_SECONDS = 300.0
_LINE_BYTES = 1 << 20


def peers_python() -> Path:
    """The Python of the peers' environment, built first where it is missing (minutes)."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen) / "bin" / "python"
    if not (ROOT / ".peers" / ".installed").exists():
        say("building the programs to compare with: make bench-peers (minutes, once)")
        subprocess.run(["make", "-C", str(ROOT), "bench-peers"], check=True, stdout=sys.stderr)
    return ROOT / ".peers" / "bin" / "python"


class PeerProcess:
    """`async with PeerProcess(python, script, …) as peer: await peer.ask(what="decode")`."""

    def __init__(self, python: Path, script: str, *arguments: str) -> None:
        self._command = [str(python), str(Path(__file__).parent / script), *arguments]
        self._process: asyncio.subprocess.Process | None = None
        self.greeting: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_BYTES,
            start_new_session=True,
        )
        try:
            self.greeting = await self._answer()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def ask(self, **question: object) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_SECONDS):
            while line := await self._process.stdout.readline():
                try:
                    value = json.loads(line)
                except ValueError:
                    continue  # the library's own words
                if isinstance(value, dict):
                    return value
        raise RuntimeError(f"{' '.join(self._command)} ended with exit code {await self._process.wait()}")

    async def _end(self) -> None:
        """Its standard input ends, and so does it; its servers are its children and go with it."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(10.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
