"""The dialler: one DEALER socket for each connection.

Links are never re-made behind our back: when TCP breaks, the connection is over, and whoever wants another dials again.

Knows: CURVE settings, link events, handshakes. Does not know: messages, leases, tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence

import zmq

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError, TrustError
from edge_runtime.transport import tcp
from edge_runtime.transport.base import MAX_FRAME_BYTES, Frame, Peer
from edge_runtime.transport.channel import OPEN, WIRE_VERSION, Channel
from edge_runtime.transport.expected import Expected
from edge_runtime.transport.zeromq.delivery import CLOSE_GRACE_SECONDS, deliver, head, packed
from edge_runtime.transport.zmq_socket import SETTINGS, LoopSocket, Part
from edge_runtime.trust.admission import zmq_runtime
from edge_runtime.trust.identity import KeyPair, device_id

ROUTING_ID_BYTES = 16
# A server too busy to finish a handshake in a second breaks it off just as one that does not understand it.
_HANDSHAKE_TRIES = 3


class DialledChannel(Channel):
    """A connection that was dialled has a socket of its own, and so can be waited for without the event loop."""

    def __init__(self, wire: _DialledWire, peer: Peer, remote: str) -> None:
        super().__init__(peer, wire, remote=remote)
        self._dialled = wire

    def wait(self, seconds: float) -> None:
        """Keep the event loop from turning until something arrives (`on_list` is given it), or for `seconds`."""
        self._dialled.wait(seconds)


class _DialledWire:
    """The dialler's side: one DEALER socket, one link, never re-made."""

    def __init__(self, endpoint: str, key: KeyPair, server_public_key: bytes) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        peer = Peer(device_id(server_public_key), server_public_key)
        self.channel = DialledChannel(self, peer, endpoint)
        self._hung_up = asyncio.Event()
        self._connected = False
        self._gone = ""
        context, _zap = zmq_runtime()
        raw = context.socket(zmq.DEALER)
        try:
            for option, value in SETTINGS:
                raw.setsockopt(option, value)
            raw.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            raw.setsockopt(zmq.RECONNECT_IVL, -1)
            raw.setsockopt(
                zmq.HANDSHAKE_IVL, 0
            )  # `connect` has its own time-out, and says so when it is over
            raw.setsockopt(
                zmq.ROUTING_ID, b"\x01" + os.urandom(ROUTING_ID_BYTES - 1)
            )  # a first zero byte is libzmq's
            raw.setsockopt(zmq.CURVE_SERVERKEY, server_public_key)
            raw.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
            raw.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
            self._socket = LoopSocket(
                raw, on_list=self._on_list, on_event=self._on_event, on_idle=self._on_idle
            )
            raw.setsockopt(zmq.IPV6, int("[" in endpoint))
            raw.connect(endpoint)
        except zmq.ZMQError as error:
            raw.close(0)
            raise TransportError(f"can't dial {endpoint}: {error.strerror}") from error

    def head(self, sizes_bytes: Sequence[int]) -> bytes | None:
        return head(sizes_bytes)

    def write_whole(self, piece: bytes) -> None:
        if self._socket.closed:
            raise ConnectionClosed("the other side has gone")
        try:
            self._socket.send_one(piece)
        except zmq.Again as error:
            raise ConnectionClosed("the other side has gone") from error

    def expect(self, expected: Expected) -> None:
        """Nothing: whoever has rows for this device dials it."""

    def write(self, parts: Sequence[Frame]) -> None:
        self._send(packed(parts))

    def _send(self, parts: Sequence[Frame]) -> None:
        if self._socket.closed:
            raise ConnectionClosed("the other side has gone")
        try:
            self._socket.send(parts)
        except zmq.Again as error:
            raise ConnectionClosed("the other side has gone") from error

    def wait(self, seconds: float) -> None:
        self._socket.wait(seconds)

    def cut(self) -> None:
        self._hung_up.set()
        self._socket.close()

    async def finish(self) -> None:
        """The listener hangs up when it has read everything. Hanging up first could make TCP throw the rest away."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE_SECONDS):
                    await self._hung_up.wait()
        finally:
            self.cut()

    def _on_list(self, _routing_id: bytes, parts: Sequence[Part]) -> None:
        if self.opened.done():
            deliver(self.channel, parts)
        elif [part.bytes for part in parts] == [OPEN, WIRE_VERSION]:
            self.opened.set_result(None)
        else:
            self._fail(
                ProtocolError(
                    "the other side does not open a link the way this version does",
                    hint="update edge-runtime on the older of the two",
                )
            )

    def _on_event(self, event: int, value: int) -> None:
        address = self.channel.remote
        if event == zmq.EVENT_CONNECTED:
            self._connected = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            with contextlib.suppress(ConnectionClosed):
                self.write([OPEN, WIRE_VERSION])
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._fail(
                TrustError(
                    f"{address} does not admit this device's key",
                    hint="pair the device (again) with a fresh join link",
                    code="not_admitted",
                )
            )
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            self._fail(_wrong_key(address))
        elif event == zmq.EVENT_CLOSED and not self._connected:
            self._fail(
                TransportError(f"nobody listens at {address}", hint="check the address, and that it runs")
            )
        elif event == zmq.EVENT_DISCONNECTED:
            self._gone = "the other side has gone"

    def _on_idle(self) -> None:
        if self._gone:
            self._fail(TransportError(f"{self.channel.remote} closed the link before it was open"))
            self.channel.lost(self._gone)
            self.cut()

    def _fail(self, error: TransportError | TrustError | ProtocolError) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)


async def connect(
    address: str, key: KeyPair, server_public_key: bytes, *, timeout_seconds: float = 5.0
) -> DialledChannel:
    """Dial `tcp://HOST:PORT`, whose key must be `server_public_key`. Takes no longer than `timeout_seconds`."""
    try:
        async with asyncio.timeout(timeout_seconds):
            endpoint = await tcp.resolve(address)
            for tries_left in reversed(range(_HANDSHAKE_TRIES)):
                wire = _DialledWire(endpoint, key, server_public_key)
                try:
                    await wire.opened
                    break
                except BaseException as error:
                    wire.cut()
                    if (
                        not isinstance(error, TrustError)
                        or error.code != "wrong_server_key"
                        or not tries_left
                    ):
                        raise
    except TimeoutError as error:
        raise TransportError(
            f"{address} did not finish the handshake in {timeout_seconds:g} s",
            hint="a firewall may be between, something else may listen there, or its key is not the one given",
            code="timeout",
        ) from error
    return wire.channel


def _wrong_key(address: str) -> TrustError:
    return TrustError(
        f"{address} is not the peer this key belongs to: the handshake was not understood",
        hint="the key in the join link is not this server's, or something else listens there; get a fresh join link",
        code="wrong_server_key",
    )
