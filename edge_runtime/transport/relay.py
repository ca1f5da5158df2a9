"""Links through the coordinator, for two devices that can't reach each other.

Each list travels as the payload of a `Relay` message. Its first frame says which of the two made the connection and
what the list is; the channel's windows work end to end, so a slow device slows only those who send to it.

Knows: how relayed connections are made and told apart. Does not know: who may talk to whom (the coordinator checks that
both are members of the lease, the mesh that the peer is in its own).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from edge_runtime.errors import ConnectionClosed, EdgeRuntimeError, ProtocolError
from edge_runtime.protocol.messages import Message, Relay
from edge_runtime.transport.base import MAX_FRAME_BYTES, MAX_FRAMES, Frame, Peer
from edge_runtime.transport.channel import CLOSE, OPEN, Channel

log = logging.getLogger(__name__)

ControlSend = Callable[[Message, Sequence[Frame]], Awaitable[None]]

# The Relay message and the kind travel with the application's frames.
MAX_RELAYED_FRAMES = MAX_FRAMES - 2
_DIALLER = b">"  # said by the side that made the connection
_ACCEPTOR = b"<"


class _RelayWire:
    def __init__(self, port: RelayPort, peer: Peer, side: bytes) -> None:
        self.side = side
        self.channel = Channel(
            peer,
            self,
            remote=f"relay:{peer.device_id}",
            max_frames=MAX_RELAYED_FRAMES,
            max_list_bytes=MAX_FRAME_BYTES,
        )
        self._port = port

    def write(self, parts: Sequence[Frame]) -> None:
        self._port.post(self.channel.peer.device_id, [self.side + bytes(parts[0]), *parts[1:]])

    def cut(self) -> None:
        self._port.forget(self)

    async def finish(self) -> None:
        self._port.forget(self)


class RelayPort:
    """All relayed connections of one agent. `run` carries what they write to the coordinator."""

    def __init__(self, send: ControlSend, *, on_accepted: Callable[[Channel], None]) -> None:
        self.lease = 0  # said with each relayed list; the mesh keeps it at its current one
        self._send = send
        self._on_accepted = on_accepted
        self._outbox: deque[tuple[str, list[Frame]]] = deque()
        self._pending = asyncio.Event()
        self._wires: dict[tuple[str, bytes], _RelayWire] = {}
        self._closed = False

    async def run(self) -> None:
        """Until cancelled. The windows of the channels bound what can wait here."""
        while True:
            await self._pending.wait()
            self._pending.clear()
            while self._outbox:
                peer, parts = self._outbox.popleft()
                try:
                    await self._send(Relay(peer, self.lease), parts)
                except EdgeRuntimeError as error:
                    self.lost(f"the relay has gone: {error.message}")

    def dial(self, peer: Peer) -> Channel:
        """A new connection. It is usable at once: the relay keeps order, so nothing can overtake its opening."""
        wire = self._add(peer, _DIALLER)
        wire.write([OPEN])
        return wire.channel

    def relayed(self, peer: Peer, frames: Sequence[memoryview]) -> None:
        """What came from `peer` (as proved by the coordinator) through the relay."""
        if not frames or frames[0].nbytes != 2:
            log.warning("dropped a relayed list of device %s without a kind", peer.device_id)
            return
        said_by, kind = bytes(frames[0][:1]), bytes(frames[0][1:])
        own_side = _ACCEPTOR if said_by == _DIALLER else _DIALLER
        if said_by == _DIALLER and kind == OPEN:
            self._on_accepted(self._add(peer, _ACCEPTOR).channel)
            return
        wire = self._wires.get((peer.device_id, own_side))
        if wire is not None:
            self._deliver(wire, kind, frames[1:])
        elif kind != CLOSE:
            self.post(
                peer.device_id, [own_side + CLOSE]
            )  # it was closed here, or this agent was started anew

    def cut(self, device_id: str, reason: str) -> None:
        """End both connections with a device that may no longer use them."""
        for side in (_DIALLER, _ACCEPTOR):
            if wire := self._wires.get((device_id, side)):
                wire.channel.abort(reason)

    def lost(self, reason: str) -> None:
        """The coordinator link broke: every relayed connection is over."""
        self._outbox.clear()
        for wire in list(self._wires.values()):
            wire.channel.lost(reason)
        self._wires.clear()

    def post(self, device_id: str, parts: list[Frame]) -> None:
        if self._closed:
            raise ConnectionClosed("the relay was closed")
        self._outbox.append((device_id, parts))
        self._pending.set()

    def forget(self, wire: _RelayWire) -> None:
        key = (wire.channel.peer.device_id, wire.side)
        if self._wires.get(key) is wire:
            del self._wires[key]

    def _add(self, peer: Peer, side: bytes) -> _RelayWire:
        old = self._wires.get((peer.device_id, side))
        if old is not None:
            old.channel.lost("the connection was made anew")
        wire = self._wires[(peer.device_id, side)] = _RelayWire(self, peer, side)
        return wire

    def _deliver(self, wire: _RelayWire, kind: bytes, frames: Sequence[memoryview]) -> None:
        try:
            wire.channel.deliver(kind, list(frames))
        except ProtocolError as error:
            log.warning("cut the relayed link to device %s: %s", wire.channel.peer.device_id, error.message)
            wire.channel.abort(error.message)
