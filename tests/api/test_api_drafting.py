"""The drafting socket over a service that shifts the alphabet, with real frames on a real WebSocket."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import aiohttp
import pytest

from coordinator.api.socket_key import KEY_PREFIX, PROTOCOL
from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.speculative.wire import CommittedDecoder, DraftEncoder, chain_frame
from tests.support.api_server import ADMIN_KEY, OTHER_KEY, USER_KEY, Server
from tests.support.coordinator_world import until

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "seed": 3, "drafter": "suffix"}


async def _committed(socket: aiohttp.ClientWebSocketResponse) -> tuple[list[int], str, dict[str, Any]]:
    decoder, finish = CommittedDecoder(256), ""
    ids: list[int] = []
    while not finish:
        frame = decoder.decode(await socket.receive_bytes())
        ids.extend(frame.ids)
        finish = frame.finish
    return ids, finish, json.loads(await socket.receive_str())


async def test_ids_come_down_as_frames_and_drafts_go_to_the_service(server: Server) -> None:
    server.service.hold = asyncio.Event()
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY)
        head = await socket.receive_json()
        assert head["prompt_token_ids"] == list(b"abc")
        assert head["sampling"]["seed"] == 3
        assert head["vocab_size"] == 256
        await socket.send_bytes(DraftEncoder(256).encode(chain_frame(0, 4, (5, 6))))
        await until(lambda: bool(server.service.drafts))
        request, draft, source = server.service.drafts[0]
        assert (draft.base_row, draft.ids, source) == (4, (5, 6), "suffix")
        assert str(request).startswith(head["id"])
        server.service.hold.set()
        ids, finish, end = await _committed(socket)
    assert bytes(ids) == b"defghi"
    assert finish == "length"
    assert end["usage"]["completion_tokens"] == 6


async def test_a_device_is_told_once_how_loaded_the_target_is(server: Server) -> None:
    server.service.loads = (0.0, 0.6)
    server.service.hold = asyncio.Event()
    decoder, frames = CommittedDecoder(256), []
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json({**BODY, "max_tokens": 60})
        await socket.receive_json()
        frames.append(decoder.decode(await socket.receive_bytes()))
        server.service.hold.set()
        while not frames[-1].finish:
            frames.append(decoder.decode(await socket.receive_bytes()))
    assert frames[0].ids == (ord("d"),)
    loads = [frame.load for frame in frames if frame.load is not None]
    assert loads == [pytest.approx(0.6, abs=0.01)]
    assert sum(len(frame.ids) for frame in frames) == 60


async def test_a_broken_socket_is_taken_up_again_after_what_the_device_has(server: Server) -> None:
    server.service.hold = asyncio.Event()
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY)
        head = await socket.receive_json()
        await socket.receive_bytes()
    async with asyncio.timeout(5):
        await server.service.all_closed.wait()
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json({"resume": head["id"], "after": 2})
        assert (await socket.receive_json())["after"] == 2
        ids, _, _ = await _committed(socket)
    assert bytes(ids) == b"fghi"


async def test_another_tenant_cannot_take_it_up(server: Server) -> None:
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY)
        head = await socket.receive_json()
    headers = {"Authorization": f"Bearer {OTHER_KEY}"}
    async with server.http.ws_connect(f"{server.url}/v1/drafting", headers=headers) as socket:
        await socket.send_json({"resume": head["id"]})
        assert (await socket.receive_json())["error"]["code"] == "request_not_found"


async def test_garbage_is_told_and_ends_the_socket(server: Server) -> None:
    server.service.hold = asyncio.Event()
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY)
        await socket.receive_json()
        await socket.send_bytes(b"\x00")
        while (message := await socket.receive()).type is aiohttp.WSMsgType.BINARY:
            pass
        assert json.loads(message.data)["error"]["code"] == "protocol"
    async with asyncio.timeout(5):
        await server.service.all_closed.wait()


async def test_what_a_socket_cannot_do_is_refused_by_name(server: Server) -> None:
    for change, param in (({"n": 2}, "n"), ({"logprobs": 1}, "logprobs"), ({"kind": "poem"}, "kind")):
        async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
            await socket.send_json(BODY | change)
            assert (await socket.receive_json())["error"]["param"] == param
    async with server.http.get(f"{server.url}/v1/drafting") as answer:
        assert answer.status == 400


async def test_the_tokenizer_comes_with_the_digest_that_the_socket_names(server: Server) -> None:
    async with server.http.get(f"{server.url}/v1/tokenizer") as answer:
        body = await answer.read()
        assert answer.headers["ETag"] == f'"{sha256_digest(body)}"'
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY)
        assert (await socket.receive_json())["tokenizer"] == sha256_digest(body)


def _page_protocols(key: str) -> tuple[str, str]:
    return PROTOCOL, KEY_PREFIX + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


async def test_a_pages_socket_carries_its_key_as_a_subprotocol_and_never_gets_it_back(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        aiohttp.ClientSession() as page,
        page.ws_connect(f"{server.url}/v1/drafting", protocols=_page_protocols(USER_KEY)) as socket,
    ):
        assert socket.protocol == PROTOCOL
        await socket.send_json(BODY)
        assert "prompt_token_ids" in await socket.receive_json()
    assert KEY_PREFIX not in caplog.text


@pytest.mark.parametrize(
    "protocols",
    [
        _page_protocols("sk-edge-wrong-0000000000"),
        _page_protocols(USER_KEY)[1:],  # without ours it would be logged as unknown
        (PROTOCOL, KEY_PREFIX + "*"),
        (PROTOCOL, KEY_PREFIX + "gA"),  # no UTF-8
        (*_page_protocols(USER_KEY), _page_protocols(ADMIN_KEY)[1]),
        (PROTOCOL,),
    ],
)
async def test_a_page_without_a_valid_key_gets_no_socket(server: Server, protocols: tuple[str, ...]) -> None:
    async with aiohttp.ClientSession() as page:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await page.ws_connect(f"{server.url}/v1/drafting", protocols=protocols)
    assert refused.value.status == 401


async def test_two_keys_at_once_are_none(server: Server) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await server.http.ws_connect(f"{server.url}/v1/drafting", protocols=_page_protocols(USER_KEY))
    assert refused.value.status == 401


async def test_a_device_without_a_tokenizer_gets_text_after_its_ids(server: Server) -> None:
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY | {"text": True})
        head = await socket.receive_json()
        assert await _ids_and_text(socket) == (b"defghi", "defghi")
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json({"resume": head["id"], "after": 4, "text": True})
        await socket.receive_json()
        assert await _ids_and_text(socket) == (b"hi", "hi")
    async with server.http.ws_connect(f"{server.url}/v1/drafting") as socket:
        await socket.send_json(BODY | {"text": 1})
        assert (await socket.receive_json())["error"]["param"] == "text"


async def _ids_and_text(socket: aiohttp.ClientWebSocketResponse) -> tuple[bytes, str]:
    """Until the end; every text counts the tokens that came before it."""
    decoder, text = CommittedDecoder(256), ""
    ids: list[int] = []
    first: int | None = None
    while True:
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            frame = decoder.decode(message.data)
            first = frame.position - len(b"abc") if first is None else first
            ids.extend(frame.ids)
            continue
        said = json.loads(message.data)
        if "finish_reason" in said:
            return bytes(ids), text
        text += said["text"]
        assert first is not None
        assert said["tokens"] == first + len(ids)
