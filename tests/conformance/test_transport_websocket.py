"""WebSocket's own: lists as messages, and dialers that do not play by the rules."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError
from edge_runtime.transport import websocket
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import SigningKey

SERVER, DEVICE = SigningKey.generate(), SigningKey.generate()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=16), st.integers(1, 64))
def test_lists_survive_being_messages(frames: list[bytes], chunk_bytes: int) -> None:
    reader = websocket.ListReader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(websocket, "CHUNK_BYTES", chunk_bytes)
        messages = websocket.pack_list([b"D", *frames])
    results = [reader.add(message) for message in messages]
    assert results[:-1] == [None] * (len(messages) - 1)
    assert results[-1] is not None
    assert (results[-1][0], [bytes(frame) for frame in results[-1][1]]) == (b"D", frames)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_other_bytes_are_protocol_errors_and_nothing_else(messages: list[bytes]) -> None:
    reader = websocket.ListReader()
    for message in messages:
        with contextlib.suppress(ProtocolError):
            reader.add(message)
            reader.add(b"\x01" + message)


@pytest.fixture
async def listener() -> AsyncIterator[websocket.WebsocketListener]:
    listener = await websocket.listen("ws://127.0.0.1:0", SERVER, Admission([DEVICE.public]))
    async with asyncio.timeout(20):
        yield listener
    await listener.close()


async def still_serves(listener: websocket.WebsocketListener) -> None:
    near = await websocket.connect(listener.address, DEVICE, SERVER.public)
    far = await listener.accept()
    await near.send([b"ping"])
    assert bytes((await far.receive())[0]) == b"ping"
    await near.close()


@pytest.mark.parametrize("answer", [b"", b"x" * 64, bytes(128), bytes(1000), "text", None])
async def test_a_dialler_without_proof_is_refused(
    listener: websocket.WebsocketListener, answer: bytes | str | None
) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(listener.address) as link:
        greeting = await link.receive_bytes()
        assert len(greeting) > 32
        if isinstance(answer, bytes):
            await link.send_bytes(answer)
        elif isinstance(answer, str):
            await link.send_str(answer)
        else:
            await link.close()
        assert (await link.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert listener._accepted.empty()
    await still_serves(listener)


async def test_a_proof_can_not_be_used_twice(listener: websocket.WebsocketListener) -> None:
    nonce = bytes(32)
    async with aiohttp.ClientSession() as session:
        answers = []
        for _ in range(2):
            async with session.ws_connect(listener.address) as link:
                greeting = await link.receive_bytes()
                if not answers:
                    said = websocket._transcript(
                        b"dialler", SERVER.public, DEVICE.public, greeting[-32:] + nonce
                    )
                    answers.append(DEVICE.public + nonce + DEVICE.sign(said))
                await link.send_bytes(answers[0])
                answers.append((await link.receive()).type)
    assert answers[1:] == [aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.CLOSE]
    await (await listener.accept()).close()


async def test_nonsense_after_the_proof_cuts_the_link(listener: websocket.WebsocketListener) -> None:
    for nonsense in (b"", b"\x01", b"\x01?", b"\x01D\x00\x00", b"\x07D"):
        near = await websocket.connect(listener.address, DEVICE, SERVER.public)
        far = await listener.accept()
        await near._wire._link.send_bytes(nonsense)  # type: ignore[attr-defined]
        with pytest.raises(ConnectionClosed):
            await far.receive()
        await near.close()
    await still_serves(listener)


async def test_another_server_there_is_said(listener: websocket.WebsocketListener) -> None:
    with pytest.raises(TransportError):
        await websocket.connect(listener.address.replace("/link", "/other"), DEVICE, SERVER.public)
    with pytest.raises(TransportError):
        await websocket.connect("nonsense", DEVICE, SERVER.public)
    for address in ("127.0.0.1:0", "ws://", "ws://127.0.0.1:x"):
        with pytest.raises(TransportError, match="not a WebSocket address"):
            await websocket.listen(address, SERVER, Admission())
