"""Streams, byte by byte: what is on the wire, how it ends, and how it goes on after a break."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from edge_runtime.errors import RequestFailed
from tests.support.api_server import ADMIN_KEY, OTHER_KEY
from tests.support.fake_service import GENERATOR, FakeService

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "seed": 0,
    "max_tokens": 2,
    "stream": True,
}
COMPLETION = {"model": "tiny", "prompt": "hi", "seed": 0, "max_tokens": 3, "stream": True}


async def read(server, path: str, body: dict[str, object], **headers: str) -> bytes:
    async with server.http.post(server.url + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        return await response.read()


def masked(data: bytes) -> str:
    """The stream's text with its id and creation time, which differ each time, by name."""
    text = data.decode("utf-8")
    first = next(json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
    return text.replace(first["id"], "ID").replace(f'"created":{first["created"]}', '"created":0')


async def test_golden_chat_stream(server):
    data = await read(server, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    head = (
        'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"tiny",'
        '"system_fingerprint":"fp_0123456789abcdef","seed":0,"choices":'
    )
    assert masked(data) == (
        ": keep-alive\n\n"
        + head
        + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        + '"usage":null}\n\n'
        + "id: ID/1\n"
        + head
        + '[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + "id: ID/2\n"
        + head
        + '[{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + "id: ID/2\n"
        + head
        + '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n'
        + head
        + '[],"usage":{"prompt_tokens":19,"completion_tokens":2,"total_tokens":21,'
        + '"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
        + "data: [DONE]\n\n"
    )


async def test_golden_completion_stream(server):
    data = await read(server, "/v1/completions", COMPLETION | {"max_tokens": 1, "logprobs": 1})
    head = (
        'data: {"id":"ID","object":"text_completion","created":0,"model":"tiny",'
        '"system_fingerprint":"fp_0123456789abcdef","seed":0,"choices":'
    )
    assert masked(data) == (
        ": keep-alive\n\n"
        "id: ID/1\n"
        + head
        + '[{"index":0,"text":"a","logprobs":{"tokens":["a"],"token_logprobs":[-0.5],"top_logprobs":[{"a":-0.5}],'
        + '"text_offset":[0]},"finish_reason":null}]}\n\n'
        + "id: ID/1\n"
        + head
        + '[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}]}\n\n'
        + "data: [DONE]\n\n"
    )


def chunks_of(data: bytes) -> list[tuple[str, dict]]:
    """(event id, chunk) of every chunk."""
    found, event_id = [], ""
    for line in data.decode("utf-8").splitlines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: {"):
            found.append((event_id, json.loads(line[6:])))
            event_id = ""
    return found


def texts_of(data: bytes) -> dict[int, str]:
    texts: dict[int, str] = {}
    for _, chunk in chunks_of(data):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def test_streamed_choices_are_those_of_the_whole_answer(server):
    body = COMPLETION | {"n": 3, "prompt": ["hi", "yo"], "max_tokens": 5}
    streamed = texts_of(await read(server, "/v1/completions", body))
    async with server.http.post(f"{server.url}/v1/completions", json=body | {"stream": False}) as response:
        whole = await response.json()
    assert streamed == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert len(streamed) == 6


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_broken_stream_goes_on_after_any_event(server, logprobs):
    body = COMPLETION | {"max_tokens": 4, "n": 2, "stream_options": {"include_usage": True}}
    body |= {} if logprobs is None else {"logprobs": logprobs}
    events = chunks_of(await read(server, "/v1/completions", body))
    named = [index for index, (event_id, _) in enumerate(events) if event_id]
    for index in named:
        event_id = events[index][0]
        url = f"{server.url}/v1/requests/{event_id.split('/')[0]}/stream"
        async with server.http.get(url, headers={"Last-Event-ID": event_id}) as response:
            rest = chunks_of(await response.read())
        by_choice: dict[int, list[object]] = {0: [], 1: []}
        again: dict[int, list[object]] = {0: [], 1: []}
        for each, wanted in ((events[index + 1 :], by_choice), (rest, again)):
            for _, chunk in each:
                for choice in chunk["choices"]:
                    if not choice["finish_reason"]:
                        wanted[choice["index"]].append(choice)
        assert again == by_choice
        assert rest[-1][1]["usage"] == events[-1][1]["usage"]
        finishes = {c["index"] for _, chunk in rest for c in chunk["choices"] if c["finish_reason"]}
        assert finishes == {0, 1}


async def test_a_stream_can_be_read_again_from_its_start_or_by_the_same_post(server):
    data = await read(server, "/v1/completions", COMPLETION)
    event_id, chunk = chunks_of(data)[0]
    async with server.http.get(f"{server.url}/v1/requests/{chunk['id']}/stream") as response:
        assert await response.read() == data
    rest = await read(server, "/v1/completions", COMPLETION, **{"Last-Event-ID": event_id})
    assert texts_of(rest) == {0: "bc"}
    async with server.http.get(
        f"{server.url}/v1/requests/{chunk['id']}/stream", headers={"Last-Event-ID": "2"}
    ) as response:
        assert texts_of(await response.read()) == {0: "c"}


async def test_nobody_elses_stream_can_be_read(server):
    _, chunk = chunks_of(await read(server, "/v1/completions", COMPLETION))[0]
    other = {"Authorization": f"Bearer {OTHER_KEY}"}
    async with server.http.get(f"{server.url}/v1/requests/{chunk['id']}/stream", headers=other) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "request_not_found"


@pytest.mark.parametrize(
    "last", ["", "x", "1", "1.2", "/1", "nope/1", "cmpl-x/1", "ID/1.2", "ID/-1", "ID/x", "ID/", "9" * 2000]
)
async def test_an_event_id_that_is_none_is_refused(server, last):
    _, chunk = chunks_of(await read(server, "/v1/completions", COMPLETION))[0]
    headers = {"Last-Event-ID": last.replace("ID", chunk["id"])}
    async with server.http.post(f"{server.url}/v1/completions", json=COMPLETION, headers=headers) as response:
        assert response.status in (400, 404)


async def test_comments_keep_a_slow_stream_alive(start, monkeypatch):
    monkeypatch.setattr("coordinator.api.openai.answer.KEEP_ALIVE_SECONDS", 0.01)
    service = FakeService(hold=asyncio.Event())
    server = await start(service)
    async with server.http.post(f"{server.url}/v1/completions", json=COMPLETION) as response:
        seen = b""
        while seen.count(b": keep-alive\n\n") < 3:
            seen += await response.content.readany()
        assert texts_of(seen) == {0: "a"}
        service.hold.set()
        assert texts_of(await response.read()) == {0: "bc"}


async def test_a_refusal_after_the_first_bytes_is_told_in_the_stream(start):
    server = await start(FakeService(error=RequestFailed("The last device left."), error_after=1))
    data = await read(server, "/v1/completions", COMPLETION)
    last = chunks_of(data)[-1][1]
    assert last["error"]["message"] == "The last device left."
    assert b"[DONE]" not in data


def post_bytes(port: int, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_cancels_its_generations(start, stream, n):
    service = FakeService(hold=asyncio.Event())
    server = await start(service)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post_bytes(server.port, COMPLETION | {"stream": stream, "n": n}))
    async with asyncio.timeout(5):
        if stream:
            await reader.readuntil(b"data: ")
        await service.all_running(n)
        writer.close()
        await writer.wait_closed()
        await service.all_closed.wait()
    assert len(service.closed) == n
    async with server.http.get(f"{server.url}/metrics") as response:
        assert (
            f'edge_runtime_request_failure_total{{model_name="tiny",reason="cancelled"}} {n}.0'
            in await response.text()
        )


async def test_one_failing_choice_stops_the_others(start):
    service = FakeService(max_running=2, hold=asyncio.Event())
    server = await start(service)
    async with server.http.post(f"{server.url}/v1/completions", json=COMPLETION | {"n": 3}) as response:
        assert response.status in (200, 429)
        await response.read()
    assert not service.running


async def test_a_reader_that_takes_nothing_holds_its_generation_back_and_then_ends_it(start, monkeypatch):
    monkeypatch.setattr("edge_runtime.server_events.WRITE_SECONDS", 0.1)
    tokens = 200_000  # tens of megabytes of chunks: more than any socket buffer takes
    service = FakeService(model=replace(GENERATOR, max_context_tokens=2 * tokens))
    server = await start(service)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.write(post_bytes(server.port, COMPLETION | {"max_tokens": tokens}))
    async with asyncio.timeout(30):
        await service.all_closed.wait()
    assert service.generated < tokens / 2
    writer.transport.abort()
