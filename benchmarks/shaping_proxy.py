"""A TCP proxy that makes a good link bad: delay, rate, cuts, and links that are open and silent.

Between two processes of ours it stands for a wide-area link; the machines that run the tests have no `netem`. It sees
encrypted bytes only. Delay and rate hold for each direction of each connection, and can be changed while it runs.

Each connection is a thread that waits in `select`, which counts in microseconds. An event loop counts in whole
milliseconds and its streams take several turns for a packet: 20 ms of round trip were 21.7 that way.

Knows: bytes and time. Does not know: what is carried.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from types import TracebackType

_CHUNK_BYTES = 16 << 10
_QUEUE_BYTES = 256 << 10
_UNLIMITED_BYTES_PER_SECOND = 1e9
_JOIN_SECONDS = 5.0
_AWAKE_SECONDS = (
    0.0004  # a thread that slept for milliseconds is this much late at times; it waits the last of them awake
)


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
    """`with ShapingProxy("host", port) as proxy:` then dial `proxy.address` instead."""

    def __init__(self, target_host: str, target_port: int, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self._target = (target_host, target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._waker = _Waker()
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._thread = threading.Thread(target=self._accept, name="shaping-proxy")

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> ShapingProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waker.wake()
        self._thread.join(_JOIN_SECONDS)
        self._waker.close()
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection, and wait until they are; new ones may be made."""
        with self._lock:
            connections = tuple(self._connections)
            self._connections.clear()
        for connection in connections:
            connection.cut()

    def change(self, **changes: float | bool) -> None:
        """`proxy.change(silent=True)`: a link that is up and dead, until it is changed back."""
        self.shape = replace(self.shape, **changes)  # type: ignore[arg-type]
        with self._lock:
            for connection in self._connections:
                connection.look_again()

    def _accept(self) -> None:
        while True:
            waiting: list[socket.socket | _Waker] = [self._listener, self._waker]
            readable, _, _ = select.select(waiting, [], [])
            if self._waker in readable:
                return
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()  # nobody at the target: so is nobody here
                continue
            with self._lock:
                for ended in [each for each in self._connections if not each.is_open]:
                    ended.cut()
                    self._connections.remove(ended)
                self._connections.add(_Connection(self, near, far))


class _Waker:
    """What `select` waits for besides bytes."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # as many are waiting as it holds
            self._theirs.send(b"!")

    def woken(self) -> None:
        self._ours.recv(_CHUNK_BYTES)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class _Connection:
    """Both directions of one, in a thread of its own until one side ends or it is cut."""

    def __init__(self, proxy: ShapingProxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (near, far)
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
        self._directions = (_Direction(near, far), _Direction(far, near))
        self._waker = _Waker()
        self._cut = False
        self._thread = threading.Thread(target=self._run, name="shaped-connection")
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def cut(self) -> None:
        self._cut = True
        self._waker.wake()
        self._thread.join(_JOIN_SECONDS)
        self._waker.close()

    def look_again(self) -> None:
        self._waker.wake()

    def _run(self) -> None:
        try:
            while not self._cut and not any(each.is_over for each in self._directions):
                self._turn()
        except OSError:
            pass  # one side was reset: so is the other
        finally:
            for each in self._sockets:
                each.close()

    def _turn(self) -> None:
        shape, now = self._proxy.shape, time.monotonic()
        due = min(each.write(now, shape) for each in self._directions)
        readers: list[socket.socket | _Waker] = [self._waker]
        readers += [each.source for each in self._directions if each.has_room(shape)]
        writers = [each.target for each in self._directions if each.is_held_up]
        timeout = None if math.isinf(due) else max(0.0, due - _AWAKE_SECONDS - time.monotonic())
        readable, _, _ = select.select(readers, writers, [], timeout)
        shape, now = self._proxy.shape, time.monotonic()  # which may have changed meanwhile
        for each in self._directions:
            if each.source in readable:
                each.read(now, shape)
        if self._waker in readable:
            self._waker.woken()


class _Direction:
    """Bytes one way: read, kept until they are due, written."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.is_held_up = False  # the target's side takes no more
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._queued_bytes = 0
        self._free_at = 0.0  # when the wire has carried what went before
        self._ended = False

    @property
    def is_over(self) -> bool:
        return self._ended and not self._queue

    def has_room(self, shape: Shape) -> bool:
        return not self._ended and self._queued_bytes <= shape.in_flight_bytes

    def read(self, now: float, shape: Shape) -> None:
        chunk = self.source.recv(_CHUNK_BYTES)
        self._ended = not chunk
        if chunk:
            due = now + shape.delay_seconds
            if shape.bytes_per_second:
                due = self._free_at = max(self._free_at, due) + len(chunk) / shape.bytes_per_second
            self._queue.append((due, memoryview(chunk)))
            self._queued_bytes += len(chunk)

    def write(self, now: float, shape: Shape) -> float:
        """All that is due and that the target takes; returns when there will be more to write."""
        self.is_held_up = False
        while self._queue and not shape.silent:
            due, chunk = self._queue[0]
            if due > now:
                return due
            try:
                sent = self.target.send(chunk)
            except BlockingIOError:
                self.is_held_up = True
                break
            self._queued_bytes -= sent
            if sent == len(chunk):
                self._queue.popleft()
            else:
                self._queue[0] = (due, chunk[sent:])
        return math.inf
