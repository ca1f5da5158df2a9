"""Links inside one process: for tests and for a device that is its own coordinator.

The same keys are asked for and checked as on a network link, and the same windows hold; only the bytes stay where they
are. Knows: names (`inproc://NAME`) of this process. Does not know: messages.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError, TrustError
from edge_runtime.transport.base import Frame, Peer
from edge_runtime.transport.channel import Channel
from edge_runtime.trust.admission import Gate
from edge_runtime.trust.identity import KeyPair, device_id

_MAX_UNACCEPTED = 1024
_listeners: dict[str, InprocListener] = {}
_numbers = itertools.count(1)


class _InprocWire:
    """One direction: what is written here is delivered there, in the event loop's next round."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.other: Channel | None = None

    def write(self, parts: Sequence[Frame]) -> None:
        if self.other is None or self.other.closed:
            raise ConnectionClosed("the other side has gone")
        frames = [memoryview(part).cast("B").toreadonly() for part in parts[1:]]
        self._loop.call_soon(self._deliver, self.other, bytes(parts[0]), frames)

    def cut(self) -> None:
        if self.other is not None:
            self._loop.call_soon(self.other.lost, "the other side has gone")
            self.other = None

    async def finish(self) -> None:
        self.cut()

    @staticmethod
    def _deliver(channel: Channel, kind: bytes, frames: list[memoryview]) -> None:
        try:
            channel.deliver(kind, frames)
        except ProtocolError as error:
            channel.abort(error.message)


class InprocListener:
    def __init__(self, name: str, key: KeyPair, admission: Gate) -> None:
        self.key = key
        self._name = name
        self._admission = admission
        self._accepted: asyncio.Queue[Channel | None] = asyncio.Queue(_MAX_UNACCEPTED)
        self._channels: list[Channel] = []
        self._closed = False
        self._unsubscribe = admission.subscribe(self._revoked)
        _listeners[name] = self

    @property
    def address(self) -> str:
        return f"inproc://{self._name}"

    async def accept(self) -> Channel:
        channel = None if self._closed else await self._accepted.get()
        if channel is None:
            raise ConnectionClosed("the listener was closed")
        return channel

    async def disconnect(self, device_id: str) -> None:
        for channel in self._live():
            if channel.peer.device_id == device_id:
                channel.abort("the device was disconnected")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        del _listeners[self._name]
        for channel in self._live():
            await channel.close()
        if not self._accepted.full():
            self._accepted.put_nowait(None)

    def admit(self, key: KeyPair) -> Channel:
        """The dialer's end of a new link, whose other end waits in `accept`."""
        if not self._admission.is_allowed(key.public):
            raise TrustError(f"{self.address} does not admit this device's key", hint="pair the device first")
        if self._accepted.full():
            raise TransportError(f"{self.address} has too many connections waiting")
        loop = asyncio.get_running_loop()
        here, there = _InprocWire(loop), _InprocWire(loop)
        near = Channel(Peer(device_id(self.key.public), self.key.public), here, remote=self.address)
        far = Channel(Peer(device_id(key.public), key.public), there, remote=self.address)
        here.other, there.other = far, near
        self._channels = [*self._live(), far]
        self._accepted.put_nowait(far)
        return near

    def _live(self) -> list[Channel]:
        return [channel for channel in self._channels if not channel.closed]

    def _revoked(self, public_key: bytes) -> None:
        for channel in self._live():
            if channel.peer.public_key == public_key:
                channel.abort("the device was revoked")


async def listen(address: str, key: KeyPair, admission: Gate) -> InprocListener:
    """`inproc://NAME`; an empty NAME gets one of its own."""
    name = _name(address) or f"link-{next(_numbers)}"
    if name in _listeners:
        raise TransportError(f"somebody listens at inproc://{name} already")
    return InprocListener(name, key, admission)


async def connect(address: str, key: KeyPair, server_public_key: bytes) -> Channel:
    listener = _listeners.get(_name(address))
    if listener is None:
        raise TransportError(f"nobody listens at {address}")
    if listener.key.public != server_public_key:
        raise TrustError(f"{address} is not the peer this key belongs to", hint="check the join link")
    return listener.admit(key)


def _name(address: str) -> str:
    if not address.startswith("inproc://"):
        raise TransportError(f"{address!r} is not an in-process address", hint="write inproc://NAME")
    return address.removeprefix("inproc://")
