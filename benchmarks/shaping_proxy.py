"""A TCP proxy that makes a good link bad: delay, rate, cuts, and links that are open and silent.

Between two processes of ours it stands for a wide-area link; the machines that run the tests have no `netem`. It sees
encrypted bytes only. Delay and rate hold for each direction of each connection, and can be changed while it runs.

Knows: bytes and time. Does not know: what is carried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from types import TracebackType

_CHUNK_BYTES = 16 << 10
_QUEUE_BYTES = 256 << 10
_UNLIMITED_BYTES_PER_SECOND = 1e9
_LOOP_TICK_SECONDS = 0.0015


@dataclass(frozen=True, slots=True)
class Shape:
    """`delay_seconds` one way; `bytes_per_second` 0 for no limit; `silent`: connected, and nothing gets through."""

    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0
    silent: bool = False

    @property
    def in_flight_bytes(self) -> float:
        """On the wire and in a router's queue; beyond that a sender is stopped by TCP, not by our memory."""
        rate = self.bytes_per_second or _UNLIMITED_BYTES_PER_SECOND
        return _QUEUE_BYTES + rate * self.delay_seconds


class ShapingProxy:
    """`async with ShapingProxy("host", port) as proxy:` then dial `proxy.address` instead."""

    def __init__(self, target_host: str, target_port: int, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.forwarded_bytes = 0
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ShapingProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every connection; new ones may be made."""
        for writer in self._writers:
            writer.transport.abort()

    async def change(self, **changes: float | bool) -> None:
        """`await proxy.change(silent=True)`: a link that is up and dead, until it is changed back."""
        async with self._changed:
            self.shape = replace(self.shape, **changes)  # type: ignore[arg-type]
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers.add(far_writer)
            try:
                await _first_of(
                    _Direction(self, reader, far_writer).run(), _Direction(self, far_reader, writer).run()
                )
            finally:
                far_writer.transport.abort()
                self._writers.discard(far_writer)
        except OSError:
            return  # nobody at the target, or a connection was reset: so is the other
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def while_silent(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self.shape.silent)


class _Direction:
    """Bytes one way: read, kept until they are due, written."""

    def __init__(
        self, proxy: ShapingProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._queued_bytes = 0
        self._taken = asyncio.Event()

    async def run(self) -> None:
        await _first_of(self._read(), self._write())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while chunk := await self._reader.read(_CHUNK_BYTES):
            shape = self._proxy.shape
            self._queued_bytes += len(chunk)
            self._queue.put_nowait((loop.time() + shape.delay_seconds, chunk))
            while self._queued_bytes > shape.in_flight_bytes:
                await self._wait_taken()
        while self._queued_bytes:
            await self._wait_taken()

    async def _wait_taken(self) -> None:
        self._taken.clear()
        await self._taken.wait()

    async def _write(self) -> None:
        free_at = 0.0  # when the wire has carried what went before
        while True:
            due, chunk = await self._queue.get()
            if rate := self._proxy.shape.bytes_per_second:
                due = free_at = max(free_at, due) + len(chunk) / rate
            await _until(due)
            await self._proxy.while_silent()
            self._writer.write(chunk)
            await self._writer.drain()
            self._proxy.forwarded_bytes += len(chunk)
            self._queued_bytes -= len(chunk)
            self._taken.set()


async def _until(due: float) -> None:
    """The event loop counts in whole milliseconds, much of a short delay: the thread sleeps the last of them."""
    loop = asyncio.get_running_loop()
    early = due - loop.time() - _LOOP_TICK_SECONDS
    if early > 0:
        await asyncio.sleep(early)
    left = due - loop.time()
    if left > 0:
        time.sleep(left)  # noqa: ASYNC251


async def _first_of(*works: Coroutine[None, None, None]) -> None:
    """Until one ends or fails; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
