"""Shaping proxies in a process of their own, so that they do not share an interpreter with whoever measures.

Knows: ports, one shape, a child process. Does not know: who talks through the proxies.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from benchmarks.shaping_proxy import Shape, ShapingProxy

_ROOT = Path(__file__).parents[1]


@asynccontextmanager
async def proxies(target_ports: Sequence[int], shape: Shape) -> AsyncGenerator[list[int], None]:
    """Ports on loopback, each of which leads to one of `target_ports` there. Ends with the context."""
    numbers = [shape.delay_seconds, shape.bytes_per_second, *target_ports]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.proxy_process"),
        *map(str, numbers),
        cwd=_ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield json.loads(await child.stdout.readline())
    finally:
        child.stdin.close()  # which ends it
        await child.wait()


def _serve(shape: Shape, target_ports: Sequence[int]) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(ShapingProxy("127.0.0.1", port, shape)) for port in target_ports]
        print(json.dumps([proxy.port for proxy in opened]), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    delay_seconds, bytes_per_second, *ports = sys.argv[1:]
    _serve(Shape(float(delay_seconds), float(bytes_per_second)), [int(port) for port in ports])
