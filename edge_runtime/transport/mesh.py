"""What an agent talks to its peers with: each device of the current peer lease, directly or through the relay.

The way to a peer is chosen once per lease: direct, if the lease names an address and the first handshake there succeeds
within two seconds, otherwise relayed. Messages of one peer arrive in order. Devices that a lease leaves out are cut at
once, and what they sent and nobody read yet is dropped.

Knows: leases, ways, and messages as such. Does not know: stages, sessions, or what a message means.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from edge_runtime.core import DeviceId
from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError, TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import Message, PeerEntry, PeerLease, PeerLeaseBody
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Frame, Peer
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.relay import ControlSend, RelayPort
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair
from edge_runtime.trust.lease import LeaseReader

log = logging.getLogger(__name__)

DIRECT: Final = "direct"
RELAYED: Final = "relay"
HANDSHAKE_SECONDS = 2.0
_RETRY_SECONDS = 0.1  # a peer that has not got its lease yet does not admit us yet
_INBOX_MESSAGES = 256

Received = tuple[DeviceId, Message, list[memoryview]]
OnMessage = Callable[[DeviceId, Message, list[memoryview]], None]
OnLook = Callable[[DeviceId, list[memoryview]], Callable[[], None] | None]


@dataclass(slots=True)
class _Route:
    """One peer of the current lease: `way` is "" until the first message to it."""

    entry: PeerEntry
    way: str = ""
    channel: Channel | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def peer(self) -> Peer:
        return Peer(self.entry.device_id, self.entry.public_key)


class Mesh:
    """Use as `async with Mesh(...) as mesh`. `control_send` takes a message to the coordinator.

    `signing_key` is the coordinator's Ed25519 public key; `data_address` where to listen for peers ("" for nowhere).
    With `on_message` each message is handed over as it arrives, and there is nothing to `receive`. `look` sees its
    frames before; what it returns is called after (`Channel.on_list`).
    """

    def __init__(
        self,
        key: KeyPair,
        device_id: DeviceId | str,
        signing_key: bytes,
        control_send: ControlSend,
        data_address: str = "tcp://127.0.0.1:0",
        *,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        on_message: OnMessage | None = None,
        look: OnLook | None = None,
    ) -> None:
        self.data_address = data_address  # once entered: with the real port, for `Hello`
        self._key = key
        self._device_id = DeviceId(device_id)
        self._reader = LeaseReader(signing_key, device_id)
        self._handshake_seconds = handshake_seconds
        self._admission = Admission()
        self._routes: dict[str, _Route] = {}
        self._on_message = on_message
        self._on_look = look
        self._inbox: asyncio.Queue[Received | None] = asyncio.Queue(_INBOX_MESSAGES)
        self._relay = RelayPort(control_send, on_accepted=self._read_from)
        self._listener: zeromq.ZeromqListener | None = None
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_on: Channel | None = None  # what the message came on that is being handed over
        self._last_heard: dict[str, Channel] = {}  # by device, what its latest message came on
        self._closed = False

    async def __aenter__(self) -> Mesh:
        if self.data_address:
            self._listener = await zeromq.listen(self.data_address, self._key, self._admission, name="peers")
            self.data_address = self._listener.address
        await self._group.__aenter__()
        self._start(self._relay.run())
        if self._listener is not None:
            self._start(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
        await self._group.__aexit__(kind, error, trace)

    async def close(self) -> None:
        """Hang up on everybody. Idempotent; a waiting `receive` ends with ConnectionClosed."""
        if self._closed:
            return
        self._closed = True
        self._relay.lost("the mesh was closed")
        await asyncio.gather(
            *[route.channel.close() for route in self._routes.values() if route.channel is not None]
        )
        if self._listener is not None:
            await self._listener.close()
        for task in self._tasks:
            task.cancel()
        if not self._inbox.full():
            self._inbox.put_nowait(None)

    def ways(self) -> Mapping[DeviceId, str]:
        """How each peer is reached: "direct", "relay", or "" if nothing was sent to it yet."""
        return {DeviceId(name): route.way for name, route in self._routes.items()}

    def apply_lease(self, lease: PeerLease) -> PeerLeaseBody:
        """Replace the list of peers. Raises TrustError for a lease that is not to be believed."""
        body = self._reader.accept(lease)
        peers = {entry.device_id: entry for entry in body.peers if entry.device_id != self._device_id}
        for name in [name for name in self._routes if name not in peers]:
            self._drop(self._routes.pop(name))
            self._last_heard.pop(name, None)
        for entry in peers.values():
            self._admission.allow(entry.public_key)
            route = self._routes.get(entry.device_id)
            if route is not None and route.way == DIRECT and route.entry == entry:
                continue  # a direct link that works stays
            if route is not None and route.channel is not None:
                route.channel.abort("a new lease looks for the way anew")
            self._routes[entry.device_id] = _Route(entry)
        self._relay.lease = body.number
        return body

    async def send(self, device_id: str, message: Message, payloads: Sequence[Frame] = ()) -> None:
        """Waits while the peer is slow. Raises TrustError (not in the lease), TransportError (could not be reached)."""
        if device_id == self._device_id:
            views = [memoryview(frame) for frame in codec.encode(message, payloads)[1:]]
            if self._on_message is not None:
                asyncio.get_running_loop().call_soon(self._on_message, self._device_id, message, views)
            else:
                await self._inbox.put((self._device_id, message, views))
            return
        route = self._routes.get(device_id)
        if route is None:
            raise TrustError(f"device {device_id} is not in this device's peer lease", code="not_in_lease")
        channel = route.channel
        if channel is None or channel.closed:
            channel = await self._connect(route)
        await channel.send(codec.encode(message, payloads))

    def try_send(self, device_id: str, message: Message, payloads: Sequence[Frame] = ()) -> bool:
        """`send` where that takes no waiting: a link that is up and has room. False, and nothing done, otherwise."""
        route = self._routes.get(device_id)
        if route is None or route.channel is None or route.channel.closed or route.lock.locked():
            return False
        try:
            return route.channel.try_send(codec.encode(message, payloads))
        except ConnectionClosed:
            return False  # `send` dials anew

    def ready(self, device_id: str) -> Channel | None:
        """The link to a peer, where it is up and nobody waits for it."""
        route = self._routes.get(device_id)
        if route is None or route.channel is None or route.channel.closed or route.lock.locked():
            return None
        return route.channel

    def heard_on(self, device_id: str) -> Channel | None:
        """The link that a peer's latest message came on, where it is up."""
        channel = self._last_heard.get(device_id)
        return None if channel is None or channel.closed or device_id not in self._routes else channel

    async def reach(self, device_id: str) -> None:
        """Have a direct link to a peer. Raises TrustError (not in the lease), TransportError (there is none)."""
        route = self._routes.get(device_id)
        if route is None:
            raise TrustError(f"device {device_id} is not in this device's peer lease", code="not_in_lease")
        await self._connect(route)
        if route.way != DIRECT:
            raise TransportError(
                f"device {device_id} can't be reached directly",
                hint="experts are shared over direct links: let the device have an address that others can dial",
            )

    def wait(self, device_id: str, seconds: float) -> None:
        """Keep the event loop from turning until something comes over the direct link to a peer, or for `seconds`.

        What comes is handed to `on_message` as ever. Raises ConnectionClosed where there is no such link (any more).
        """
        route = self._routes.get(device_id)
        channel = route.channel if route is not None else None
        if not isinstance(channel, zeromq.DialledChannel) or channel.closed:
            raise ConnectionClosed(f"the link to device {device_id} broke")
        channel.wait(seconds)

    def cut(self, device_id: str, reason: str) -> None:
        """End the link to a peer; it may be dialled anew."""
        route = self._routes.get(device_id)
        if route is not None and route.channel is not None:
            route.channel.abort(reason)

    def try_answer(self, message: Message, payloads: Sequence[Frame] = ()) -> bool:
        """Over the link that the message which `on_message` is being given came on. False where that has no room."""
        if self._heard_on is None:
            return False
        try:
            return self._heard_on.try_send(codec.encode(message, payloads))
        except ConnectionClosed:
            return False

    async def receive(self) -> Received:
        """The next message of any peer."""
        while True:
            received = None if self._closed else await self._inbox.get()
            if received is None:
                raise ConnectionClosed("the mesh was closed")
            if received[0] == self._device_id or received[0] in self._routes:
                return received

    def relayed(self, source: str, frames: Sequence[memoryview]) -> None:
        """Payload frames of a `Relay` message from the coordinator, whose `peer` is `source`."""
        route = self._routes.get(source)
        if route is None:
            log.warning("dropped a relayed list of device %s, which is not in the peer lease", source)
            return
        self._relay.relayed(route.peer, frames)

    def control_lost(self) -> None:
        """The coordinator link broke: relayed connections are over; direct ones go on."""
        self._relay.lost("the link to the coordinator broke")

    async def _connect(self, route: _Route) -> Channel:
        async with route.lock:
            if route.channel is not None and not route.channel.closed:
                return route.channel
            if route.way != RELAYED and route.entry.address:
                try:
                    channel = await self._dial(route.entry)
                    route.way = DIRECT
                except (TransportError, TrustError, ProtocolError) as error:
                    if route.way == DIRECT:
                        raise  # the way is not changed within a lease: order would be lost
                    log.info("device %s is relayed: %s", route.entry.device_id, error.message)
            if route.way != DIRECT:
                route.way = RELAYED
                channel = self._relay.dial(route.peer)
            if self._routes.get(route.entry.device_id) is not route:
                channel.abort("a new lease came meanwhile")
                raise TransportError(
                    f"the way to device {route.entry.device_id} changed", hint="send it again"
                )
            route.channel = channel
            self._read_from(channel)
            return channel

    async def _dial(self, entry: PeerEntry) -> Channel:
        try:
            async with asyncio.timeout(self._handshake_seconds):
                while True:
                    try:
                        return await zeromq.connect(entry.address, self._key, entry.public_key)
                    except TrustError as error:
                        if error.code != "not_admitted":
                            raise
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError as error:
            raise TransportError(
                f"{entry.address} can't be dialled within {self._handshake_seconds:g} s"
            ) from error

    async def _accept(self, listener: zeromq.ZeromqListener) -> None:
        while True:
            try:
                self._read_from(await listener.accept())
            except ConnectionClosed:
                return

    def _read_from(self, channel: Channel) -> None:
        if self._on_message is None:
            self._start(self._read(channel))
            return
        try:
            source = DeviceId(channel.peer.device_id)
            look = functools.partial(self._look, source) if self._on_look is not None else None
            channel.on_list(functools.partial(self._arrived, channel, source), look)
        except ProtocolError as error:
            log.warning("cut the link to device %s: %s", channel.peer.device_id, error.message)
            channel.abort(error.message)

    def _look(self, source: DeviceId, frames: list[memoryview]) -> Callable[[], None] | None:
        return self._on_look(source, frames) if source in self._routes and self._on_look is not None else None

    def _arrived(self, channel: Channel, source: DeviceId, frames: list[memoryview]) -> None:
        message, payloads = codec.decode(frames)
        if source not in self._routes or self._on_message is None:
            return
        before, self._heard_on = self._heard_on, channel
        self._last_heard[source] = channel
        try:
            self._on_message(source, message, payloads)
        finally:
            self._heard_on = before

    async def _read(self, channel: Channel) -> None:
        source = DeviceId(channel.peer.device_id)
        try:
            while True:
                message, payloads = codec.decode(await channel.receive())
                await self._inbox.put((source, message, payloads))
        except ConnectionClosed:
            return
        except ProtocolError as error:
            log.warning("cut the link to device %s: %s", source, error.message)
            channel.abort(error.message)

    def _drop(self, route: _Route) -> None:
        reason = "the device is not in the peer lease any more"
        self._admission.revoke(route.entry.public_key)  # cuts what it dialled
        self._relay.cut(route.entry.device_id, reason)
        if route.channel is not None:
            route.channel.abort(reason)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        if self._closed:
            work.close()
            return
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
