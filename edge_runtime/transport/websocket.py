"""Links over WebSocket, for browsers and for places where nothing but HTTP gets through.

Both sides prove an Ed25519 key by signing both sides' nonces and both keys; the dialler knows the listener's key
beforehand, the listener asks its admission list. Proof is not secrecy: on a network that is not trusted the address
has to be `wss://`, with TLS ended in front of the listener. Lists are cut into messages of a bounded size, so that a
stranger can't make the listener hold more than one of those.

Knows: the challenge, how lists become WebSocket messages. Does not know: what lists mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError, TrustError
from edge_runtime.transport.base import MAX_FRAMES, MAX_LIST_BYTES, Frame, Peer
from edge_runtime.transport.channel import Channel
from edge_runtime.trust.admission import Gate
from edge_runtime.trust.identity import KEY_BYTES, SIGNATURE_BYTES, SigningKey, device_id, verify

log = logging.getLogger(__name__)

PATH = "/link"
MAX_MESSAGE_BYTES = 1 << 20
CHUNK_BYTES = MAX_MESSAGE_BYTES - 1024
HEARTBEAT_SECONDS = 20.0
HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKES = 32
_MAX_UNACCEPTED = 1024
_CLOSE_SECONDS = 1.0
_NONCE_BYTES = 32
_HELLO = b"edge-runtime link 1"
_NOT_ADMITTED, _BAD_PROOF = 4401, 4402  # WebSocket close codes
_MORE, _LAST = b"\x00", b"\x01"
_LENGTH = struct.Struct("!I")

WebSocket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


# ------------------------------------------------------------------------------------------------ lists as messages


def pack_list(parts: Sequence[Frame]) -> list[bytes]:
    """The messages of one list: a flag byte each, then a slice of: kind, and each frame behind its length."""
    blob = bytearray(parts[0])
    for part in parts[1:]:
        blob += _LENGTH.pack(len(part))
        blob += part
    step = CHUNK_BYTES
    chunks = [memoryview(blob)[at : at + step] for at in range(0, len(blob), step)]
    return [(_LAST if chunk is chunks[-1] else _MORE) + bytes(chunk) for chunk in chunks]


class ListReader:
    """Messages in, lists out. Raises ProtocolError for what is not a list, or too large for one."""

    def __init__(self) -> None:
        self._blob = bytearray()

    def add(self, message: bytes) -> tuple[bytes, list[memoryview]] | None:
        if message[:1] not in (_MORE, _LAST):
            raise ProtocolError("a WebSocket message without its flag")
        self._blob += memoryview(message)[1:]
        if len(self._blob) > MAX_LIST_BYTES + MAX_FRAMES * _LENGTH.size + 1:
            raise ProtocolError("a list over WebSocket is larger than allowed")
        if message[:1] == _MORE:
            return None
        blob, self._blob = memoryview(bytes(self._blob)), bytearray()
        return bytes(blob[:1]), _split(blob[1:])


def _split(rest: memoryview) -> list[memoryview]:
    frames: list[memoryview] = []
    while rest:
        if len(rest) < _LENGTH.size or len(frames) >= MAX_FRAMES:
            raise ProtocolError("a list over WebSocket is malformed")
        (size,) = _LENGTH.unpack(rest[: _LENGTH.size])
        if size > len(rest) - _LENGTH.size:
            raise ProtocolError("a list over WebSocket is shorter than it says")
        frames.append(rest[_LENGTH.size : _LENGTH.size + size])
        rest = rest[_LENGTH.size + size :]
    return frames


# ------------------------------------------------------------------------------------------------ one link


class _WebsocketWire:
    """Reads and writes one open WebSocket while `run` runs. Both sides use it."""

    def __init__(self, link: WebSocket, peer: Peer, remote: str, is_allowed: Callable[[], bool]) -> None:
        self.channel = Channel(peer, self, remote=remote)
        self.ended = asyncio.Event()
        self._link = link
        self._is_allowed = is_allowed
        self._outbox: asyncio.Queue[Sequence[Frame] | None] = (
            asyncio.Queue()
        )  # bounded by the channel's window

    def write(self, parts: Sequence[Frame]) -> None:
        if self.ended.is_set() or self._link.closed:
            raise ConnectionClosed("the other side has gone")
        self._outbox.put_nowait(parts)

    def cut(self) -> None:
        self._outbox.put_nowait(None)
        if (tcp := self._link.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                tcp.shutdown(socket.SHUT_RDWR)

    async def finish(self) -> None:
        self._outbox.put_nowait(None)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.ended.wait()
        except TimeoutError:
            self.cut()

    async def run(self) -> None:
        writer = asyncio.ensure_future(self._write_all())
        try:
            await self._read_all()
        finally:
            self.channel.lost("the other side has gone")
            self._outbox.put_nowait(None)
            await asyncio.wait([writer], timeout=_CLOSE_SECONDS)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self.ended.set()

    async def _read_all(self) -> None:
        lists = ListReader()
        async for message in self._link:
            if message.type is not aiohttp.WSMsgType.BINARY:
                return self.channel.abort("the other side sent something that is not binary")
            if not self._is_allowed():
                return self.channel.abort("the device was revoked")
            try:
                if (found := lists.add(message.data)) is not None:
                    self.channel.deliver(*found)
            except ProtocolError as error:
                log.warning("cut the link to device %s: %s", self.channel.peer.device_id, error.message)
                return self.channel.abort(error.message)
        return None

    async def _write_all(self) -> None:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            while (parts := await self._outbox.get()) is not None:
                for message in pack_list(parts):
                    await self._link.send_bytes(message)
            await self._link.close()


def _transcript(role: bytes, listener_key: bytes, dialler_key: bytes, nonces: bytes) -> bytes:
    return b"\0".join((_HELLO, role)) + listener_key + dialler_key + nonces


# ------------------------------------------------------------------------------------------------ listening


class WebsocketListener:
    """Accepts links at `PATH`. `handle` can also be mounted in another aiohttp application."""

    def __init__(self, key: SigningKey, admission: Gate) -> None:
        self.address = ""
        self._key = key
        self._admission = admission
        self._wires: set[_WebsocketWire] = set()
        self._handshakes = 0
        self._accepted: asyncio.Queue[Channel | None] = asyncio.Queue(_MAX_UNACCEPTED)
        self._runner: web.AppRunner | None = None
        self._closed = False
        self._unsubscribe = admission.subscribe(self._on_revoked)

    async def bind(self, host: str, port: int) -> None:
        application = web.Application()
        application.router.add_get(PATH, self.handle)
        self._runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=_CLOSE_SECONDS
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise TransportError(
                f"can't listen at {host}:{port}: {error.strerror}", hint="choose another port"
            ) from error
        bound: Any = self._runner.addresses[0]
        self.address = f"ws://{f'[{host}]' if ':' in host else host}:{bound[1]}{PATH}"

    async def accept(self) -> Channel:
        channel = None if self._closed else await self._accepted.get()
        if channel is None:
            raise ConnectionClosed("the listener was closed")
        return channel

    async def disconnect(self, device_id: str) -> None:
        for wire in list(self._wires):
            if wire.channel.peer.device_id == device_id:
                wire.channel.abort("the device was disconnected")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        await asyncio.gather(*[wire.channel.close() for wire in self._wires])
        if self._runner is not None:
            await self._runner.cleanup()
        with contextlib.suppress(asyncio.QueueFull):
            self._accepted.put_nowait(None)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self._handshakes >= MAX_HANDSHAKES or self._accepted.full() or self._closed:
            raise web.HTTPServiceUnavailable(text="too many links are being opened, try again\n")
        link = web.WebSocketResponse(
            max_msg_size=MAX_MESSAGE_BYTES,
            compress=False,
            heartbeat=HEARTBEAT_SECONDS,
            timeout=_CLOSE_SECONDS,
        )
        self._handshakes += 1
        try:
            await link.prepare(request)
            public_key = await self._prove(link)
        finally:
            self._handshakes -= 1
        if public_key is None:
            return link
        wire = _WebsocketWire(
            link,
            Peer(device_id(public_key), public_key),
            str(request.remote or ""),
            lambda: self._admission.is_allowed(public_key),
        )
        self._wires.add(wire)
        try:
            self._accepted.put_nowait(wire.channel)
            await wire.run()
        finally:
            self._wires.discard(wire)
        return link

    async def _prove(self, link: web.WebSocketResponse) -> bytes | None:
        """Challenge the dialler, check its key, answer its own challenge. None: it was told to go."""
        nonce = os.urandom(_NONCE_BYTES)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await link.send_bytes(_HELLO + nonce)
                answer = await link.receive_bytes()
                public_key, nonces = answer[:KEY_BYTES], nonce + answer[KEY_BYTES : KEY_BYTES + _NONCE_BYTES]
                signature = answer[KEY_BYTES + _NONCE_BYTES :]
                said = _transcript(b"dialler", self._key.public, public_key, nonces)
                if len(nonces) != 2 * _NONCE_BYTES or not verify(public_key, signature, said):
                    await link.close(code=_BAD_PROOF, message=b"the proof of the key does not hold")
                elif not self._admission.is_allowed(public_key):
                    log.warning("refused device %s: its key is not admitted", device_id(public_key))
                    await link.close(code=_NOT_ADMITTED, message=b"this key is not admitted")
                else:
                    said = _transcript(b"listener", self._key.public, public_key, nonces)
                    await link.send_bytes(self._key.sign(said))
                    return public_key
        except (
            TimeoutError,
            TypeError,
            ConnectionError,
        ):  # TypeError: aiohttp's word for "not a binary message"
            await link.close()
        return None

    def _on_revoked(self, public_key: bytes) -> None:
        for wire in list(self._wires):
            if wire.channel.peer.public_key == public_key:
                wire.channel.abort("the device was revoked")


async def listen(address: str, key: SigningKey, admission: Gate) -> WebsocketListener:
    """Bind `ws://HOST:PORT` (port 0: any)."""
    host, _, port = address.removeprefix("ws://").removesuffix(PATH).removesuffix("/").rpartition(":")
    if not address.startswith("ws://") or not host or not port.isdecimal():
        raise TransportError(
            f"{address!r} is not a WebSocket address to listen at", hint="write ws://HOST:PORT"
        )
    listener = WebsocketListener(key, admission)
    await listener.bind(host.removeprefix("[").removesuffix("]"), int(port))
    return listener


# ------------------------------------------------------------------------------------------------ dialling


async def connect(
    address: str, key: SigningKey, server_public_key: bytes, *, timeout_seconds: float = HANDSHAKE_SECONDS
) -> Channel:
    """Dial `ws://HOST:PORT/link` or `wss://…`, whose Ed25519 key must be `server_public_key`."""
    session = aiohttp.ClientSession()
    try:
        async with asyncio.timeout(timeout_seconds):
            link = await session.ws_connect(
                address,
                max_msg_size=MAX_MESSAGE_BYTES,
                compress=0,
                heartbeat=HEARTBEAT_SECONDS,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),
            )
            await _prove(link, address, key, server_public_key)
    except TimeoutError as error:
        await session.close()
        raise TransportError(f"{address} did not finish the handshake in {timeout_seconds:g} s") from error
    except (aiohttp.ClientError, ValueError, TypeError) as error:
        await session.close()
        raise TransportError(
            f"can't dial {address}: {error}", hint="check the address, and that it runs"
        ) from error
    except BaseException:
        await session.close()
        raise
    wire = _WebsocketWire(link, Peer(device_id(server_public_key), server_public_key), address, lambda: True)
    reader = asyncio.ensure_future(_run_then_close(wire, session))
    _running.add(reader)
    reader.add_done_callback(_running.discard)
    return wire.channel


_running: set[asyncio.Future[None]] = (
    set()
)  # a dialled link reads until it ends; its owner ends it by `close`


async def _run_then_close(wire: _WebsocketWire, session: aiohttp.ClientSession) -> None:
    try:
        await wire.run()
    finally:
        await session.close()


async def _prove(
    link: aiohttp.ClientWebSocketResponse, address: str, key: SigningKey, server_public_key: bytes
) -> None:
    greeting = await link.receive_bytes()
    if len(greeting) != len(_HELLO) + _NONCE_BYTES or not greeting.startswith(_HELLO):
        raise TransportError(f"{address} does not open a link the way this version does")
    nonce = os.urandom(_NONCE_BYTES)
    nonces = greeting[len(_HELLO) :] + nonce
    said = _transcript(b"dialler", server_public_key, key.public, nonces)
    await link.send_bytes(key.public + nonce + key.sign(said))
    answer = await link.receive()
    wrong_key = TrustError(
        f"{address} is not the peer this key belongs to",
        hint="get a fresh join link",
        code="wrong_server_key",
    )
    if answer.type is not aiohttp.WSMsgType.BINARY:
        if answer.data == _BAD_PROOF:  # our proof names the key we expect, and it is not the one over there
            raise wrong_key
        raise TrustError(
            f"{address} does not admit this device's key",
            hint="pair the device (again) with a fresh join link",
            code="not_admitted",
        )
    proof = _transcript(b"listener", server_public_key, key.public, nonces)
    if len(answer.data) != SIGNATURE_BYTES or not verify(server_public_key, answer.data, proof):
        raise wrong_key
