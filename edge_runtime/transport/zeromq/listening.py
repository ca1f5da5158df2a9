"""The listener: one ROUTER socket for all connections of an address.

A connection is a routing id together with the key libzmq proved for it; a list whose key is not the one its routing id
opened with is dropped.

Knows: CURVE settings, link events, how to cut one peer off. Does not know: messages, leases, tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from edge_runtime.errors import ConnectionClosed, TransportError
from edge_runtime.transport import link_meter, tcp
from edge_runtime.transport.base import MAX_FRAME_BYTES, Frame, Peer
from edge_runtime.transport.channel import CLOSE, OPEN, WINDOW_BYTES, WIRE_VERSION, Channel
from edge_runtime.transport.expected import Expected
from edge_runtime.transport.zeromq.delivery import CLOSE_GRACE_SECONDS, deliver, head, packed
from edge_runtime.transport.zmq_socket import BACKLOG, SETTINGS, LoopSocket, Part
from edge_runtime.trust.admission import Gate, zmq_runtime
from edge_runtime.trust.identity import KeyPair, device_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one listener lets its peers use."""

    frame_bytes: int = MAX_FRAME_BYTES
    window_bytes: int = WINDOW_BYTES  # received from one peer and not yet taken by the application
    unaccepted: int = 1024
    connections_per_key: int = 8
    connections: int = 4096


DEFAULT_LIMITS = Limits()


class _AcceptedWire:
    """The listener's side of one connection: its routing id, its proved key, its TCP link."""

    def __init__(
        self, listener: ZeromqListener, routing_id: bytes, user_id: str, fd: int, window_bytes: int
    ) -> None:
        self.routing_id = routing_id
        self.user_id = user_id
        self.fd = fd
        self.meter = link_meter.LinkMeter(asyncio.get_running_loop().time())
        self.public_key = bytes.fromhex(user_id)
        peer = Peer(device_id(self.public_key), self.public_key)
        self.channel = Channel(peer, self, remote=tcp.peer_address(fd), window_bytes=window_bytes)
        self._listener = listener

    def head(self, sizes_bytes: Sequence[int]) -> bytes | None:
        return head(sizes_bytes)

    def write_whole(self, piece: bytes) -> None:
        self._listener.write(self, [piece])

    def expect(self, expected: Expected) -> None:
        self._listener.expect(self, expected)

    def write(self, parts: Sequence[Frame]) -> None:
        self._listener.write(self, packed(parts))

    def cut(self) -> None:
        self._listener.forget(self)
        tcp.shut_down(self.fd, self.channel.remote)

    async def finish(self) -> None:
        """The peer hangs up when it reads that we closed; a peer that does not is cut after a moment."""
        if self._listener.forget(self):
            self._listener.hanging_up.add(self.fd)
            asyncio.get_running_loop().call_later(
                CLOSE_GRACE_SECONDS, self._listener.cut_if_still_up, self.fd, self.channel.remote
            )


class ZeromqListener:
    """Serves every admitted peer from one ROUTER socket, on the event loop it was made on."""

    def __init__(self, address: str, key: KeyPair, admission: Gate, name: str, limits: Limits) -> None:
        endpoint = tcp.endpoint(address)
        context, self._zap = zmq_runtime()
        self._admission = admission
        self._limits = limits
        self._domain = self._zap.register(name, admission)
        self._wires: dict[bytes, _AcceptedWire] = {}
        self._by_fd: dict[int, _AcceptedWire] = {}
        self._gone: list[_AcceptedWire] = []
        self.hanging_up: set[int] = (
            set()
        )  # descriptors of links that were closed here, until the peer hangs up
        self._all_hung_up = asyncio.Event()
        self._accepted: asyncio.Queue[Channel | None] = asyncio.Queue(limits.unaccepted)
        raw = context.socket(zmq.ROUTER)
        try:
            for option, value in SETTINGS:
                raw.setsockopt(option, value)
            raw.setsockopt(zmq.MAXMSGSIZE, limits.frame_bytes)
            raw.setsockopt(zmq.BACKLOG, BACKLOG)
            raw.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unreachable peer is an error, not a silent loss
            raw.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another's routing id
            # All four together, and before bind: leaving any out would let strangers in.
            raw.setsockopt(zmq.CURVE_SERVER, 1)
            raw.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
            raw.setsockopt(zmq.ZAP_DOMAIN, self._domain)
            raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            raw.setsockopt(zmq.IPV6, int("[" in endpoint))
            raw.bind(endpoint)
        except zmq.ZMQError as error:
            raw.close(0)
            self._zap.unregister(self._domain)
            raise TransportError(
                f"can't listen at {address}: {error.strerror}", hint="choose another port"
            ) from error
        self.address = raw.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = LoopSocket(raw, on_list=self._on_list, on_event=self._on_event, on_idle=self._on_idle)
        self._loop = asyncio.get_running_loop()
        self._next_check = self._loop.call_later(link_meter.CHECK_SECONDS, self._check_links)
        self._unsubscribe = admission.subscribe(self._on_revoked)

    async def accept(self) -> Channel:
        channel = None if self._socket.closed else await self._accepted.get()
        if channel is None:
            raise ConnectionClosed("the listener was closed")
        return channel

    async def disconnect(self, device_id: str) -> None:
        for wire in list(self._wires.values()):
            if wire.channel.peer.device_id == device_id:
                wire.channel.abort("the device was disconnected")

    async def close(self) -> None:
        if self._socket.closed:
            return
        for wire in list(self._wires.values()):
            await wire.channel.close()
        if self.hanging_up:
            self._all_hung_up.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE_SECONDS):
                    await self._all_hung_up.wait()
        if self._socket.closed:
            return  # somebody else closed it meanwhile
        self._unsubscribe()
        self._next_check.cancel()
        self._socket.close()
        self._zap.unregister(self._domain)
        with contextlib.suppress(asyncio.QueueFull):
            self._accepted.put_nowait(None)

    def write(self, wire: _AcceptedWire, parts: Sequence[Frame]) -> None:
        """`parts` as they go over the wire."""
        if self._wires.get(wire.routing_id) is not wire or self._socket.closed:
            raise ConnectionClosed("the other side has gone")
        try:
            self._socket.send([wire.routing_id, *parts])
        except zmq.ZMQError as error:
            reason = "stopped reading" if error.errno == zmq.EAGAIN else "has gone"
            raise ConnectionClosed(f"the other side {reason}") from error

    def expect(self, wire: _AcceptedWire, expected: Expected) -> None:
        if self._wires.get(wire.routing_id) is wire:
            self._socket.expect(wire.routing_id, wire.user_id, expected)

    def forget(self, wire: _AcceptedWire) -> bool:
        """Later lists of this connection are dropped. Whether it was still known."""
        if self._by_fd.get(wire.fd) is wire:
            del self._by_fd[wire.fd]
        if self._wires.get(wire.routing_id) is not wire:
            return False
        self._socket.expect_nothing(wire.routing_id)
        del self._wires[wire.routing_id]
        return True

    def cut_if_still_up(self, fd: int, remote: str) -> None:
        self.hanging_up.discard(fd)
        if fd not in self._by_fd:
            tcp.shut_down(fd, remote)

    def _on_list(self, routing_id: bytes, parts: Sequence[Part]) -> None:
        user_id = str(parts[0].get("User-Id"))
        wire = self._wires.get(routing_id)
        if wire is None:
            self._on_stranger(routing_id, user_id, parts)
        elif wire.user_id != user_id:
            log.warning("dropped a list that came under the routing id of another device")
        elif not self._admission.is_allowed(wire.public_key):
            wire.channel.abort("the device was revoked")
        else:
            deliver(wire.channel, parts)
            wire.meter.handed_over(
                sum(map(len, parts)), len(parts)
            )  # later: whoever waits for them comes first

    def _on_stranger(self, routing_id: bytes, user_id: str, parts: Sequence[Part]) -> None:
        """A connection starts with OPEN; anything else is left over from one that was closed or cut."""
        fd = int(parts[0].get(zmq.SRCFD))
        if fd in self.hanging_up and parts[0].bytes == CLOSE:
            tcp.shut_down(fd, tcp.peer_address(fd))  # both sides closed at once: nothing more will come
        if len(parts) != 2 or parts[0].bytes != OPEN:
            return
        if parts[1].bytes != WIRE_VERSION:
            self._refuse_version(routing_id, user_id)
            return
        self._socket.read_events()  # the loss of an earlier link with this descriptor comes before this list
        if fd in self._by_fd:
            self._gone.append(self._by_fd.pop(fd))
        wire = _AcceptedWire(self, routing_id, user_id, fd, self._limits.window_bytes)
        same_key = sum(other.user_id == user_id for other in self._wires.values())
        if (
            not self._admission.is_allowed(wire.public_key)
            or same_key >= self._limits.connections_per_key
            or len(self._wires) >= self._limits.connections
            or self._accepted.full()
        ):
            log.warning(
                "refused a connection of device %s from %s", wire.channel.peer.device_id, wire.channel.remote
            )
            wire.cut()
            return
        self._wires[routing_id] = self._by_fd[fd] = wire
        try:
            wire.write([OPEN, WIRE_VERSION])
        except ConnectionClosed:
            self.forget(wire)
            return
        self._accepted.put_nowait(wire.channel)

    def _refuse_version(self, routing_id: bytes, user_id: str) -> None:
        """Whoever dials reads which version this is, and says so to a person."""
        log.warning("refused a link of another version from the device with key %s", user_id)
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send([routing_id, OPEN, WIRE_VERSION])

    def _on_event(self, event: int, value: int) -> None:
        if event != zmq.EVENT_DISCONNECTED:
            return
        if value in self._by_fd:
            self._gone.append(self._by_fd.pop(value))
        self.hanging_up.discard(value)
        if not self.hanging_up:
            self._all_hung_up.set()

    def _on_idle(self) -> None:
        """Everything that arrived was delivered: now the links that broke meanwhile may end."""
        gone, self._gone = self._gone, []
        for wire in gone:
            self.forget(wire)
            wire.channel.lost("the other side has gone")

    def _check_links(self) -> None:
        """Cut the links that made libzmq hold more than any honest peer does."""
        self._next_check = self._loop.call_later(link_meter.CHECK_SECONDS, self._check_links)
        now = self._loop.time()
        for wire in list(self._wires.values()):
            if wire.meter.holds_too_much(link_meter.received_bytes(wire.fd), now):
                log.warning("cut the link to device %s: it never ends its list", wire.channel.peer.device_id)
                wire.channel.abort("the other side never ends its list")

    def _on_revoked(self, public_key: bytes) -> None:
        for wire in list(self._wires.values()):
            if wire.public_key == public_key:
                wire.channel.abort("the device was revoked")


async def listen(
    address: str,
    key: KeyPair,
    admission: Gate,
    *,
    name: str = "data",
    limits: Limits = DEFAULT_LIMITS,
) -> ZeromqListener:
    """Bind `tcp://HOST:PORT` (port 0: any) and admit the keys `admission` allows. `name` labels the CURVE domain."""
    return ZeromqListener(address, key, admission, name, limits)
