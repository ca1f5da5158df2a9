"""One end of a connection, whatever carries it: queues, flow control and closing.

Every list of frames is preceded by one byte that says what it is. The receiver tells the sender how much of it the
application has taken (`CREDIT`); a sender that is a window ahead waits, so that a slow peer costs a bounded amount of
memory and stops nobody else. A peer that ignores its window, or says anything unknown, is cut.

Knows: the bytes and lists in flight, who waits. Does not know: sockets, keys, or messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, runtime_checkable

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError
from edge_runtime.transport.base import MAX_FRAME_BYTES, MAX_FRAMES, MAX_LIST_BYTES, Frame, Peer
from edge_runtime.transport.expected import Expected

OPEN: Final = b"O"
DATA: Final = b"D"
CREDIT: Final = b"W"
CLOSE: Final = b"C"

WIRE_VERSION: Final = b"\x02"
WINDOW_BYTES: Final = (
    16 << 20
)  # a sender goes on while less than this is not yet taken by the other application
WINDOW_LISTS: Final = 256
_LIST_OVERHEAD_BYTES: Final = 64  # so that empty lists count, too
_CREDIT_BODY: Final = struct.Struct("!QI")


Look = Callable[[list[memoryview]], Callable[[], None] | None]


class Wire(Protocol):
    """What carries a channel. `write` never blocks: the window bounds what can be queued in it."""

    def write(self, parts: Sequence[Frame]) -> None:
        """Queue one list. Raises ConnectionClosed when it can't be delivered any more."""
        ...

    def cut(self) -> None:
        """Drop the link underneath now. Idempotent."""
        ...

    async def finish(self) -> None:
        """Flush what was written, for a short while, then drop the link. Idempotent."""
        ...


@runtime_checkable
class WholeWire(Protocol):
    """A wire on which a small list is one piece: who knows its sizes beforehand has less to do when it goes."""

    def head(self, sizes_bytes: Sequence[int]) -> bytes | None:
        """What comes before frames of these sizes; None where they are too large for that."""
        ...

    def write_whole(self, piece: bytes) -> None:
        """A head and its frames. Never blocks. Raises ConnectionClosed."""
        ...

    def expect(self, expected: Expected) -> None:
        """Such a piece is due. It is delivered in any case."""
        ...


class Channel:
    """A `Connection` over a `Wire`. The wire's owner calls `deliver` for what arrives and `lost` when it breaks."""

    def __init__(
        self,
        peer: Peer,
        wire: Wire,
        *,
        remote: str = "",
        window_bytes: int = WINDOW_BYTES,
        max_frames: int = MAX_FRAMES,
        max_list_bytes: int = MAX_LIST_BYTES,
    ) -> None:
        self.remote = remote  # network address of the other side, for logs and limits; "" where there is none
        self._peer = peer
        self._wire = wire
        self._whole = wire if isinstance(wire, WholeWire) else None
        self._max_frames = max_frames
        self._max_list_bytes = max_list_bytes
        self._window_bytes = window_bytes  # what the other side may be ahead; a stranger gets less
        self._inbox: deque[tuple[list[memoryview], int]] = deque()
        self._receivers: list[asyncio.Future[None]] = []
        self._take_list: Callable[[list[memoryview]], None] | None = None
        self._look: Look | None = None
        self._senders: deque[tuple[asyncio.Future[None], int]] = deque()
        self._sent_bytes = self._sent_lists = 0  # not yet credited by the other side
        self._held_bytes = self._held_lists = 0  # received and not yet credited by us
        self._taken_bytes = self._taken_lists = 0  # of those: taken by the application
        self._closed_reason = ""

    @property
    def peer(self) -> Peer:
        return self._peer

    @property
    def closed(self) -> bool:
        return bool(self._closed_reason)

    async def send(self, frames: Sequence[Frame]) -> None:
        parts, size_bytes = _checked(frames, self._max_frames, self._max_list_bytes)
        cost = size_bytes + _LIST_OVERHEAD_BYTES
        if self._closed_reason:
            raise self._closed_error()
        if self._senders or not self._has_room():
            await self._wait_for_room(cost)
        else:
            self._reserve(cost)
        self._write(parts)

    def _write(self, parts: list[Frame]) -> None:
        try:
            self._wire.write([DATA, *parts])
        except ConnectionClosed as error:
            self.lost(error.message)
            raise

    def try_send(self, frames: Sequence[Frame]) -> bool:
        """`send` without waiting: False, and nothing done, where it would have to. Raises what `send` raises."""
        if self._closed_reason:
            raise self._closed_error()
        if self._senders or not self._has_room():
            return False
        parts, size_bytes = _checked(frames, self._max_frames, self._max_list_bytes)
        self._reserve(size_bytes + _LIST_OVERHEAD_BYTES)
        self._write(parts)
        return True

    def whole_head(self, sizes_bytes: Sequence[int]) -> bytes | None:
        """What `send_whole` wants before frames of these sizes; None where such lists go by `try_send` alone."""
        if self._whole is None or not 1 <= len(sizes_bytes) <= self._max_frames:
            return None
        return self._whole.head(sizes_bytes) if sum(sizes_bytes) <= self._max_list_bytes else None

    def send_whole(self, piece: bytes, size_bytes: int) -> bool:
        """`try_send` of what is in one piece already: a `whole_head` and its frames, `size_bytes` without the head."""
        if self._closed_reason or self._whole is None:
            raise self._closed_error()
        if self._senders or not self._has_room():
            return False
        try:
            self._whole.write_whole(piece)
        except ConnectionClosed as error:
            self.lost(error.message)
            raise
        self._reserve(size_bytes + _LIST_OVERHEAD_BYTES)
        return True

    def expect(self, expected: Expected) -> None:
        """A small list of data is due; its heads are those of `whole_head`. A later call replaces an earlier one.

        There is no promise: whatever comes is delivered, whether `expected.look` saw it before or not.
        """
        if self._whole is not None and not self._closed_reason:
            self._whole.expect(expected)

    def on_list(self, take: Callable[[list[memoryview]], None], look: Look | None = None) -> None:
        """Instead of `receive`: every list, also those that wait here, is given to `take` as it arrives.

        It spares the wake-up of a task for each list. `take` may raise ProtocolError: the owner cuts the link.
        `look` sees lists that arrive from now on before they are counted and taken; what it returns is called after.
        """
        self._take_list, self._look = take, look
        while self._inbox:
            frames, cost = self._inbox.popleft()
            self._take(cost)
            take(frames)

    async def receive(self) -> list[memoryview]:
        while not self._inbox:
            if self._closed_reason:
                raise self._closed_error()
            waiter = asyncio.get_running_loop().create_future()
            self._receivers.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._receivers:
                    self._receivers.remove(waiter)
        frames, cost = self._inbox.popleft()
        self._take(cost)
        return frames

    async def close(self) -> None:
        if not self._closed_reason:
            with contextlib.suppress(ConnectionClosed):
                self._wire.write([CLOSE])
            self._inbox.clear()
            self.lost("the connection was closed on this side")
        await self._wire.finish()

    def abort(self, reason: str) -> None:
        """Close without a word to the other side: a revoked or misbehaving peer. Nothing queued is delivered."""
        self._inbox.clear()
        self.lost(reason)
        self._wire.cut()

    def lost(self, reason: str) -> None:
        """The link is gone. What arrived before can still be received."""
        if self._closed_reason:
            return
        self._closed_reason = reason
        self._wake_receivers()
        while self._senders:
            waiter, _cost = self._senders.popleft()
            if not waiter.done():
                waiter.set_exception(self._closed_error())

    def deliver(self, kind: bytes, frames: list[memoryview]) -> None:
        """One list from the wire. Raises ProtocolError for what the other side may not do; the owner then cuts it."""
        if self._closed_reason:
            if kind == CLOSE:
                self._wire.cut()  # both sides closed at once: nothing more will come
        elif kind == DATA:
            then = self._look(frames) if self._look is not None else None
            try:
                self._deliver_data(frames)
            finally:
                if then is not None:
                    then()
        elif kind == CREDIT and len(frames) == 1 and frames[0].nbytes == _CREDIT_BODY.size:
            self._credited(*_CREDIT_BODY.unpack(frames[0]))
        elif kind == CLOSE and not frames:
            self.lost("the other side closed the connection")
            self._wire.cut()
        else:
            raise ProtocolError("an unknown kind of frame list on the link")

    def _deliver_data(self, frames: list[memoryview]) -> None:
        size_bytes = sum(frame.nbytes for frame in frames)
        if not 1 <= len(frames) <= MAX_FRAMES or size_bytes > MAX_LIST_BYTES:
            raise ProtocolError(f"a list of {len(frames)} frames and {size_bytes} bytes is over the limits")
        if self._held_bytes >= self._window_bytes or self._held_lists >= WINDOW_LISTS:
            raise ProtocolError("the other side ignores its window")
        cost = size_bytes + _LIST_OVERHEAD_BYTES
        self._held_bytes += cost
        self._held_lists += 1
        if self._take_list is not None:
            self._take(cost)
            self._take_list(frames)
            return
        self._inbox.append((frames, cost))
        self._wake_receivers()

    def _take(self, cost: int) -> None:
        self._taken_bytes += cost
        self._taken_lists += 1
        if self._taken_bytes < WINDOW_BYTES // 4 and self._taken_lists < WINDOW_LISTS // 4:
            return
        if not self._closed_reason:
            credit = _CREDIT_BODY.pack(self._taken_bytes, self._taken_lists)
            try:
                self._wire.write([CREDIT, credit])
            except ConnectionClosed as error:
                self.lost(error.message)
        self._held_bytes -= self._taken_bytes
        self._held_lists -= self._taken_lists
        self._taken_bytes = self._taken_lists = 0

    def _credited(self, size_bytes: int, lists: int) -> None:
        if size_bytes > self._sent_bytes or lists > self._sent_lists:
            raise ProtocolError("the other side took more than was sent to it")
        self._sent_bytes -= size_bytes
        self._sent_lists -= lists
        self._admit_senders()

    def _has_room(self) -> bool:
        return self._sent_bytes < WINDOW_BYTES and self._sent_lists < WINDOW_LISTS

    def _reserve(self, cost: int) -> None:
        self._sent_bytes += cost
        self._sent_lists += 1

    def _admit_senders(self) -> None:
        while self._senders and self._has_room():
            waiter, cost = self._senders.popleft()
            if not waiter.done():
                self._reserve(cost)
                waiter.set_result(None)

    async def _wait_for_room(self, cost: int) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._senders.append((waiter, cost))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._sent_bytes -= cost  # room was given, and will not be used
                self._sent_lists -= 1
            self._admit_senders()
            raise
        if self._closed_reason:
            raise self._closed_error()

    def _wake_receivers(self) -> None:
        waiters, self._receivers = self._receivers, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _closed_error(self) -> ConnectionClosed:
        return ConnectionClosed(self._closed_reason)


def _checked(frames: Sequence[Frame], max_frames: int, max_list_bytes: int) -> tuple[list[Frame], int]:
    """Flat frames and their bytes. All that can be wrong with a list shows here, before a part of it is on its way."""
    if not 1 <= len(frames) <= max_frames:
        raise TransportError(f"a list of {len(frames)} frames, 1 to {max_frames} may be sent")
    flat = [_flat(frame) for frame in frames]
    sizes = [len(frame) for frame in flat]
    if max(sizes) > MAX_FRAME_BYTES or sum(sizes) > max_list_bytes:
        raise TransportError(
            f"a list of {sum(sizes)} bytes, its largest frame {max(sizes)}; a frame may have {MAX_FRAME_BYTES}",
            hint="send it in chunks",
        )
    return flat, sum(sizes)


def _flat(frame: Frame) -> Frame:
    if isinstance(frame, bytes | bytearray):
        return frame
    if not isinstance(frame, memoryview):
        raise TransportError(f"a frame is bytes, not {type(frame).__name__}")
    if not frame.c_contiguous:
        raise TransportError("a frame that is not contiguous in memory", hint="copy it first")
    if frame.ndim == 1 and frame.format == "B":
        return frame
    return frame.cast("B") if frame.nbytes else b""
