"""Every kind of link behind one face: in process, ZeroMQ/CURVE, WebSocket, and through a relay of a few lines.

Knows: how each is listened on and dialled with keys that are, or are not, admitted. Does not know: what is tested.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from edge_runtime.errors import ConnectionClosed
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import Message, Relay
from edge_runtime.transport import inproc, websocket, zeromq
from edge_runtime.transport.base import Connection, Frame, Listener, Peer
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.relay import RelayPort
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair, SigningKey, device_id


class Carrier(ABC):
    """One transport under test: a listener that admits the keys of `new_key(paired=True)`."""

    proves_keys_when_dialling = True

    def __init__(self) -> None:
        self.admission = Admission()
        self.key = self.make_key()

    def make_key(self) -> Any:
        return KeyPair.generate()

    def new_key(self, *, paired: bool = True) -> Any:
        key = self.make_key()
        if paired:
            self.admission.allow(key.public)
        return key

    @abstractmethod
    async def listen(self) -> Listener: ...

    @abstractmethod
    async def dial(self, key: Any, server_key: bytes | None = None) -> Connection: ...

    async def close(self) -> None:
        return None


class Network(Carrier):
    module: Any = zeromq
    address = "tcp://127.0.0.1:0"

    async def listen(self) -> Listener:
        self.listener: Listener = await self.module.listen(self.address, self.key, self.admission)
        return self.listener

    async def dial(self, key: Any, server_key: bytes | None = None) -> Connection:
        link: Connection = await self.module.connect(
            self.listener.address, key, server_key or self.key.public
        )
        return link

    async def close(self) -> None:
        await self.listener.close()


class Inproc(Network):
    module = inproc
    address = "inproc://"


class Websocket(Network):
    module = websocket
    address = "ws://127.0.0.1:0"

    def make_key(self) -> Any:
        return SigningKey.generate()


class Relayed(Carrier):
    """Ports joined by a coordinator of a few lines, which passes lists on through the codec."""

    proves_keys_when_dialling = False  # the coordinator link does, before

    def __init__(self) -> None:
        super().__init__()
        self.ports: dict[str, RelayPort] = {}
        self.peers: dict[str, Peer] = {}
        self.pumps: list[asyncio.Task[None]] = []
        self.accepted: asyncio.Queue[Channel | None] = asyncio.Queue()
        self.admission.subscribe(
            lambda key: self.ports[device_id(self.key.public)].cut(device_id(key), "revoked")
        )

    async def listen(self) -> Listener:
        self._port(self.key)
        return _RelayListener(self)

    async def dial(self, key: Any, server_key: bytes | None = None) -> Connection:
        del server_key
        return self._port(key).dial(self.peers[device_id(self.key.public)])

    def _port(self, key: Any) -> RelayPort:
        name = device_id(key.public)

        async def send(message: Message, payloads: Sequence[Frame]) -> None:
            assert isinstance(message, Relay)
            _message, frames = codec.decode([bytes(frame) for frame in codec.encode(message, payloads)])
            own = device_id(self.key.public)
            if message.peer == own and not self.admission.is_allowed(key.public):
                return
            self.ports[message.peer].relayed(self.peers[name], frames)

        if name not in self.ports:
            self.peers[name] = Peer(name, key.public)
            self.ports[name] = RelayPort(send, on_accepted=self.accepted.put_nowait)
            self.pumps.append(asyncio.ensure_future(self.ports[name].run()))
        return self.ports[name]

    async def close(self) -> None:
        for pump in self.pumps:
            pump.cancel()
        await asyncio.gather(*self.pumps, return_exceptions=True)


class _RelayListener:
    address = "relay:"

    def __init__(self, carrier: Relayed) -> None:
        self._carrier = carrier

    async def accept(self) -> Connection:
        channel = await self._carrier.accepted.get()
        if channel is None:
            raise ConnectionClosed("closed")
        return channel

    async def disconnect(self, device_id: str) -> None:
        own = self._carrier.peers[self._carrier.key.device_id].device_id
        self._carrier.ports[own].cut(device_id, "disconnected")

    async def close(self) -> None:
        self._carrier.ports[self._carrier.key.device_id].lost("closed")
        self._carrier.accepted.put_nowait(None)


class Pair:
    """Both ends of one link, closed after the test."""

    def __init__(self, carrier: Carrier, listener: Listener) -> None:
        self.carrier = carrier
        self.listener = listener

    async def open(self, stack: AsyncExitStack) -> tuple[Connection, Connection]:
        near = await self.carrier.dial(self.carrier.new_key())
        far = await self.listener.accept()
        stack.push_async_callback(far.close)
        stack.push_async_callback(near.close)
        return near, far
