"""One ZeroMQ socket on the event loop, without polling and without a thread hop of ours.

libzmq signals a socket's descriptor only on a change, so it is read until it is empty, and looked at again after each
send. The socket's monitor says when a link underneath was made, refused or lost.

Knows: sockets, their events, their settings. Does not know: connections or who is at the other end.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from edge_kernels._native import Inlet
from zmq.utils.monitor import parse_monitor_message

from edge_runtime.transport.base import Frame
from edge_runtime.transport.channel import WINDOW_LISTS
from edge_runtime.transport.eager_loop import HAS_EPOLL, EagerLoop
from edge_runtime.transport.expected import Expected

_COPY_BELOW_BYTES = 64 << 10  # smaller frames are cheaper to copy than to keep track of
# Plain integers: each operation on zmq's flags is five calls of Python, and there are a dozen to a frame.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE_FOLLOWS = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_LISTS_PER_ROUND = 64  # then other callbacks of the loop have their turn

HANDSHAKE_MILLISECONDS = 1000  # idle strangers are dropped soon, or they would use up the descriptors
HEARTBEAT_MILLISECONDS = 2000
# Long, because a large frame on a slow link delays the answer; a killed process is noticed at once by its closed link.
HEARTBEAT_TIMEOUT_MILLISECONDS = 20_000
LINGER_MILLISECONDS = 1000
BACKLOG = 512

SETTINGS: tuple[tuple[int, int], ...] = (
    (zmq.LINGER, LINGER_MILLISECONDS),
    (zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS),
    (zmq.HEARTBEAT_IVL, HEARTBEAT_MILLISECONDS),
    (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MILLISECONDS),
    (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MILLISECONDS),
    # The channel's window is the real limit; these are above it also at libzmq's own half-full mark.
    (zmq.SNDHWM, 4 * WINDOW_LISTS),
    (zmq.RCVHWM, 4 * WINDOW_LISTS),
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.IMMEDIATE, 1),
)

_WATCHED_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class TakenPart:
    """A part that was read natively, as far as `zmq.Frame` is asked for anything."""

    def __init__(self, data: bytes, user: str, source_fd: int) -> None:
        self.bytes = data
        self.buffer = memoryview(data)
        self._user = user
        self._source_fd = source_fd

    def get(self, what: int | str) -> int | str:
        return self._user if what == "User-Id" else self._source_fd

    def __len__(self) -> int:
        return len(self.bytes)


@functools.cache
def _message_calls() -> tuple[int, ...]:
    """Addresses of libzmq's calls, as `Inlet` wants them. None of them: pyzmq does not say where they are."""
    try:
        library = ctypes.CDLL(importlib.import_module("zmq.backend.cython._zmq").__file__)
        names = ("init", "recv", "close", "data", "size", "more", "get", "gets")
        found = [ctypes.cast(getattr(library, f"zmq_msg_{name}"), ctypes.c_void_p).value for name in names]
    except (ImportError, OSError, AttributeError):
        return ()
    return tuple(address for address in found if address is not None)


def send_parts(socket: Any, parts: Sequence[Frame]) -> None:
    """One list, without waiting. Raises zmq.Again (no link, or full) and zmq.ZMQError(EHOSTUNREACH)."""
    send = socket.send
    for part in parts[:-1]:
        send(part, _MORE_FOLLOWS, len(part) < _COPY_BELOW_BYTES)
    send(parts[-1], _NOBLOCK, len(parts[-1]) < _COPY_BELOW_BYTES)


def receive_parts(socket: Any, is_routed: bool) -> tuple[bytes, list[zmq.Frame]]:
    """The routing id that a ROUTER puts before a list, else nothing, and the list. Raises zmq.Again: there is none.

    What is asked about who sent it is asked of the list's own parts, since an id needs no box then.
    """
    receive = socket.recv
    routing_id: bytes = receive(_NOBLOCK) if is_routed else b""
    frame = receive(_NOBLOCK, False)  # without copying
    parts = [frame]
    while frame.more:
        frame = receive(_NOBLOCK, False)
        parts.append(frame)
    return routing_id, parts


Part = zmq.Frame | TakenPart


class LoopSocket:
    """Calls `on_list(routing id, parts)` for each list read, `on_event(event, value)` for each event of the link.

    The routing id is b"" where lists have none. After events are read, `on_idle` comes last, when everything that had
    arrived was handed over.
    """

    def __init__(
        self,
        socket: Any,  # zmq.Socket; its option getter is typed int | bytes for all options
        *,
        on_list: Callable[[bytes, Sequence[Part]], None],
        on_event: Callable[[int, int], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.closed = False
        self._socket = socket
        self._is_routed = socket.type == zmq.ROUTER
        self._on_list = on_list
        self._on_event = on_event
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._monitor: Any = socket.get_monitor_socket(_WATCHED_EVENTS)
        self._scheduled = False
        self._poller: zmq.Poller | None = None
        self._inlet: Inlet | None = None
        self._expected: tuple[bytes, Expected] | None = None  # and the routing id
        self._fds = (socket.getsockopt(zmq.FD), self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fds[0], self._read_lists)
        self._loop.add_reader(self._fds[1], self._round)
        self._schedule()

    def send(self, parts: Sequence[Frame]) -> None:
        """Hand one list to libzmq. Raises zmq.Again (no link, or full) and zmq.ZMQError(EHOSTUNREACH)."""
        send_parts(self._socket, parts)
        self._look_again()

    def send_one(self, part: bytes) -> None:
        """`send` of a list of one small part."""
        self._socket.send(part, _NOBLOCK)
        self._look_again()

    def _look_again(self) -> None:
        """Sending may have consumed the signal that something arrived."""
        if not self._scheduled and int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            self._schedule()

    def expect(self, routing_id: bytes, user: str, expected: Expected) -> None:
        """The next list may be this one, of this user under this routing id: then it is looked at before all else.

        It is handed over like any other after that. For sockets whose lists have routing ids; a later call replaces
        an earlier one. Where the event loop is an ordinary one, or libzmq can't be called, nothing is ever looked at.
        """
        if self.closed or not isinstance(self._loop, EagerLoop) or not (HAS_EPOLL and _message_calls()):
            return
        if self._inlet is None:
            self._inlet = Inlet(list(_message_calls()), self._socket.underlying)
        self._inlet.expect(routing_id, user, list(expected.pieces), expected.place)
        self._expected = routing_id, expected
        self._loop.take_first(self._fds[0], self._inlet, self._taken)

    def expect_nothing(self, routing_id: bytes) -> None:
        """Nobody has this routing id any more."""
        if self._expected is not None and self._expected[0] == routing_id:
            self._end_expecting()

    def _end_expecting(self) -> None:
        if self._expected is not None and isinstance(self._loop, EagerLoop):
            self._expected = None
            self._loop.take_first(self._fds[0], None, self._taken)

    def _taken(self, is_expected: bool) -> None:
        """Before the loop has made callbacks of anything, so that its handler of exceptions has to be called here."""
        inlet, expected = self._inlet, self._expected
        if inlet is None or expected is None:
            return
        then = expected[1].look(inlet.hole()) if is_expected else None
        try:
            routing_id, user, source_fd, parts = inlet.taken()
            self._on_list(routing_id, [TakenPart(part, user, source_fd) for part in parts])
        except Exception as problem:
            self._loop.call_exception_handler({"message": "a list was not handled", "exception": problem})
        finally:
            if then is not None:
                then()
            self._schedule()  # more may have come

    def wait(self, seconds: float) -> None:
        """Until something arrives, for a caller who keeps the loop from turning; it is handed over as the loop would.

        Returns where nothing came in time.
        """
        if self.closed:
            return
        if self._poller is None:
            self._poller = zmq.Poller()
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._monitor, zmq.POLLIN)
        if self._poller.poll(max(0, math.ceil(seconds * 1000))):
            self._round()

    def read_events(self) -> None:
        while not self.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_event(int(event["event"]), int(event["value"]))

    def close(self) -> None:
        """Linger for what was sent, in libzmq's own thread."""
        if self.closed:
            return
        self.closed = True
        self._end_expecting()
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_round)

    def _scheduled_round(self) -> None:
        self._scheduled = False
        self._round()

    def _round(self) -> None:
        self.read_events()
        self._read_lists()

    def _read_lists(self) -> None:
        """The descriptor says that there is one, most of the time: the first is read without asking."""
        is_asked = False
        for _ in range(_LISTS_PER_ROUND):
            if self.closed:
                return
            if is_asked and not int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
                self._on_idle()
                return
            is_asked = True
            try:
                routing_id, parts = receive_parts(self._socket, self._is_routed)
            except zmq.Again:
                continue
            self._on_list(routing_id, parts)
        self._schedule()
