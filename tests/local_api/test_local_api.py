"""The local API against the coordinator's own, both on real sockets over one service: the same fields, everywhere."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from edge_runtime.errors import CapacityError, RequestFailed, UsageError
from edge_runtime.local_api.server import MAX_DRAFTED, LocalApiConfig, serve
from edge_runtime.sdk.sse import ServerEvent, SseParser
from tests.sdk.test_sdk_client import BreakingProxy
from tests.sdk.test_sdk_drafts import REPEATED, drafter_threads
from tests.support.api_server import ADMIN_KEY, OTHER_KEY, USER_KEY, serving
from tests.support.coordinator_world import until
from tests.support.fake_service import TOKENIZER_JSON, FakeService
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "seed": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 3}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
IDS = {"return_token_ids": True}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def url(service: FakeService) -> AsyncIterator[str]:
    async with serving(service) as server:
        yield server.url


@asynccontextmanager
async def local(url: str, **settings: Any) -> AsyncIterator[str]:
    runner, port = await serve(LocalApiConfig(url, **{"draft": "suffix", **settings}))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "bundle"
    model = TinyModel(layers=2, vocab=256, max_context=128)
    build_tiny_bundle(path, model, TOKENIZER_JSON, "{{ messages[0].content }}").close()
    return path


@pytest.fixture
def nobody(unused_tcp_port: int) -> str:
    return f"http://127.0.0.1:{unused_tcp_port}"


async def post(url: str, path: str, body: Any, key: str = USER_KEY, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, JSON or events)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + path, data=data, headers=headers) as answer,
    ):
        raw = await answer.read()
        if answer.content_type == "text/event-stream":
            assert raw.startswith(b": keep-alive\n\n")
            return answer.status, answer.headers, list(SseParser().feed(raw))
        return answer.status, answer.headers, json.loads(raw)


def without_names(value: Any) -> Any:
    """An answer without what differs from one asking to the next: ids, times."""
    if isinstance(value, ServerEvent):
        data = value.data if value.data == "[DONE]" else without_names(json.loads(value.data))
        return data, value.id.rpartition("/")[2], value.name
    if isinstance(value, list):
        return [without_names(each) for each in value]
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name not in ("id", "created")}
    return value


def all_headers(headers: Any) -> dict[str, str]:
    kept = ("Content-Type", "Retry-After", "WWW-Authenticate", "X-Accel-Buffering")
    return {name: headers[name] for name in kept if name in headers}


@pytest.mark.parametrize("more", [{}, STREAM, USAGE, IDS, STREAM | IDS, USAGE | IDS], ids=str)
@pytest.mark.parametrize(
    "body", [COMPLETION, COMPLETION | {"prompt": [97, 98]}, CHAT], ids=["text", "ids", "chat"]
)
@pytest.mark.parametrize("options", [{}, {"stop": "fg"}, {"max_tokens": 1, "temperature": 0}], ids=str)
async def test_answers_are_the_coordinator_s_field_by_field(
    url: str, service: FakeService, body: dict[str, Any], more: dict[str, Any], options: dict[str, Any]
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = {**body, **more, **options}
    service.cached_tokens = 2
    direct = await post(url, path, asked)
    async with local(url) as near:
        through = await post(near, path, asked)
    assert without_names(through[2]) == without_names(direct[2])
    assert (through[0], all_headers(through[1])) == (direct[0], all_headers(direct[1]))
    assert through[1]["X-Request-Id"].startswith("chatcmpl-" if "messages" in body else "cmpl-")
    assert not drafter_threads()


PASSED_ON = [
    {"n": 2},
    {"prompt": ["abc", "def"]},
    {"logprobs": 2},
    {"logprobs": 0, "stream": True},
    {"n": 2, "stream": True},
]
WRONG = [
    {"model": "huge"},
    {"temperature": 9},
    {"surprise": 1},
    {"kind": "chat"},
    {"resume": "cmpl-x"},
    {"prompt": ""},
    {"prompt": None},
    {"stream": "yes"},
    {"stream_options": {"include_usage": True}},
    {"max_tokens": 500},
    {"n": True},
]


@pytest.mark.parametrize("more", [*PASSED_ON, *WRONG], ids=str)
async def test_what_is_not_drafted_and_what_is_refused_is_the_coordinator_s_answer(
    url: str, more: dict[str, Any]
) -> None:
    body = {**COMPLETION, **more}
    direct = await post(url, "/v1/completions", body)
    async with local(url) as near:
        through = await post(near, "/v1/completions", body)
    assert without_names(through[2]) == without_names(direct[2])
    assert (through[0], all_headers(through[1])) == (direct[0], all_headers(direct[1]))


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b'{"model": "tiny", "model": "tiny"}', b'{"seed": NaN}', b"\xff", b"[" * 9000]
)
async def test_bytes_that_are_no_request_are_judged_there(url: str, raw: bytes) -> None:
    direct = await post(url, "/v1/completions", raw)
    async with local(url) as near:
        through = await post(near, "/v1/completions", raw)
    assert (through[0], through[2]) == (direct[0], direct[2])


@pytest.mark.parametrize("error", [CapacityError("full", code="overloaded"), RequestFailed("the tail died")])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("more", [{}, STREAM], ids=str)
async def test_failures_are_told_alike(
    url: str, service: FakeService, error: Any, after: int, more: dict[str, Any]
) -> None:
    service.error, service.error_after = error, after
    direct = await post(url, "/v1/completions", COMPLETION | more)
    async with local(url) as near:
        through = await post(near, "/v1/completions", COMPLETION | more)
    assert without_names(through[2]) == without_names(direct[2])
    assert (through[0], all_headers(through[1])) == (direct[0], all_headers(direct[1]))


async def test_keys_are_the_coordinator_s_business(url: str, service: FakeService) -> None:
    async with local(url) as near:
        for key in ("", "sk-edge-wrong-00000000000"):
            direct, through = [await post(each, "/v1/completions", COMPLETION, key) for each in (url, near)]
            assert (through[0], through[2]) == (direct[0], direct[2])
            assert through[1]["WWW-Authenticate"] == "Bearer"
        assert (await post(near, "/v1/completions", COMPLETION))[0] == 200
    async with local(url, api_key=USER_KEY) as near:
        assert (await post(near, "/v1/completions", COMPLETION, ""))[0] == 200
        assert (await post(near, "/v1/completions", COMPLETION, "sk-edge-wrong-00000000000"))[0] == 401
    tenants = {request.tenant for request in service.journal.values()}
    assert tenants == {"default"}


async def test_this_device_drafts_and_keys_share_no_memory(url: str, service: FakeService) -> None:
    """The prompts repeat nothing: only what a key's earlier answers said can be guessed."""

    async def ask(near: str, prompt: str, key: str) -> int:
        """How many drafts were sent for it."""
        service.drafts.clear()
        service.hold = asyncio.Event()
        asking = asyncio.create_task(
            post(near, "/v1/completions", COMPLETION | {"prompt": prompt, "max_tokens": 20, "seed": 1}, key)
        )
        if key == USER_KEY and prompt == "2":
            await until(lambda: bool(service.drafts))
        else:
            await until(lambda: bool(service.running))
            await asyncio.sleep(0.3)
        service.hold.set()
        status, _, body = await asking
        assert (status, body["choices"][0]["text"]) == (200, "bcdefghijklmnopqrstu")
        return len(service.drafts)

    async with local(url) as near:
        assert await ask(near, "0", USER_KEY) == 0
        assert await ask(near, "1", OTHER_KEY) == 0
        assert await ask(near, "3", ADMIN_KEY) == 0
        assert await ask(near, "2", USER_KEY) > 0
    assert not drafter_threads()


async def test_more_at_once_than_this_device_drafts_for_are_passed_on(url: str, service: FakeService) -> None:
    service.hold = asyncio.Event()
    async with local(url) as near:
        asking = [
            asyncio.create_task(
                post(near, "/v1/completions", COMPLETION | {"prompt": REPEATED, "max_tokens": 9})
            )
            for _ in range(7)
        ]
        await service.all_running(7)
        await until(lambda: len({request for request, _, _ in service.drafts}) == MAX_DRAFTED)
        service.hold.set()
        answers = [await each for each in asking]
    assert {status for status, _, _ in answers} == {200}
    assert len({body["choices"][0]["text"] for _, _, body in answers}) == 1
    assert len({request for request, _, _ in service.drafts}) == MAX_DRAFTED
    assert not drafter_threads()


async def test_leaving_cancels(url: str, service: FakeService) -> None:
    service.hold = asyncio.Event()
    headers = {"Authorization": f"Bearer {USER_KEY}"}
    async with local(url) as near, aiohttp.ClientSession(headers=headers) as http:
        for more in (STREAM, {}):
            service.all_closed.clear()
            asking = asyncio.create_task(http.post(near + "/v1/completions", json=COMPLETION | more))
            await service.all_running(1)
            if more:
                answer = await asking
                await answer.content.readany()
                answer.close()
            else:
                asking.cancel()
            async with asyncio.timeout(5):
                await service.all_closed.wait()
    assert not drafter_threads()


async def test_the_official_client_needs_no_change(url: str, service: FakeService) -> None:
    service.hold = asyncio.Event()
    async with local(url) as near, openai.AsyncOpenAI(base_url=near + "/v1", api_key=USER_KEY) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        stream = await client.completions.create(
            model="tiny",
            prompt=REPEATED,
            max_tokens=20,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [await anext(aiter(stream))]
        await until(lambda: bool(service.drafts))
        service.hold.set()
        chunks += [chunk async for chunk in stream]
        assert "".join(each.choices[0].text for each in chunks if each.choices) == "bcdefghijklmnopqrstu"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 20
        whole = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, seed=1
        )
        assert whole.choices[0].message.content == "bcde"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="huge", prompt="x")
    assert service.drafts


async def test_a_broken_stream_is_resumed_here_or_by_the_client(url: str, service: FakeService) -> None:
    proxy = BreakingProxy(int(url.rpartition(":")[2]))
    async with proxy as broken, local(broken) as near:
        await post(near, "/v1/completions", COMPLETION)
        proxy.cut_after = [900, 300]
        status, headers, events = await post(
            near, "/v1/completions", COMPLETION | STREAM | {"max_tokens": 60}
        )
        assert status == 200
        assert events[-1].data == "[DONE]"
        assert events[-2].id == f"{headers['X-Request-Id']}/60"
        proxy.cut_after.clear()
        seen = {"Last-Event-ID": events[20].id}
        _, _, rest = await post(near, "/v1/completions", COMPLETION | STREAM, **seen)
        assert without_names(rest) == without_names(events[21:])


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "host_not_allowed"),
        ({"Origin": "https://evil.example"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
    ],
)
async def test_pages_of_others_get_nothing(url: str, headers: dict[str, str], code: str) -> None:
    async with local(url, api_key=ADMIN_KEY) as near:
        status, _, body = await post(near, "/v1/completions", COMPLETION, "", **headers)
        assert (status, body["error"]["code"]) == (403, code)


async def test_only_the_model_s_routes_are_here(url: str) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with local(url) as near, aiohttp.ClientSession(headers=headers) as http:
        for path, status in [
            ("/health", 200),
            ("/ready", 200),
            ("/v1/models/tiny", 200),
            ("/v1/tokenizer", 200),
        ]:
            assert (await http.get(near + path)).status == status
        for path in ("/admin/status", "/metrics", "/", "/console/app.js"):
            answer = await http.get(near + path)
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
        assert (await http.get(near + "/v1/completions")).status == 405
        large = await http.post(near + "/v1/completions", data=io.BytesIO(b"x" * ((1 << 20) + 1)))
        assert (large.status, (await large.json())["error"]["code"]) == (413, "request_too_large")


class TestOffline:
    async def test_without_leave_it_is_unavailable(self, nobody: str) -> None:
        async with local(nobody) as near:
            for body in (COMPLETION, COMPLETION | STREAM, COMPLETION | {"n": 2}):
                status, headers, answer = await post(near, "/v1/completions", body)
                assert (status, answer["error"]["code"]) == (503, "unreachable")
                assert headers["Retry-After"] == "2"

    async def test_the_draft_model_s_answers_carry_a_mark(self, nobody: str, draft: Path) -> None:
        async with local(nobody, draft=draft, offline="draft") as near:
            status, headers, body = await post(near, "/v1/completions", COMPLETION | IDS)
            assert (status, headers["X-Edge-Runtime-Answered-By"]) == (200, "draft")
            assert body["edge_runtime"]["answered_by"] == "draft"
            assert "nothing answers" in body["edge_runtime"]["reason"]
            assert (body["usage"]["completion_tokens"], body["seed"]) == (5, 3)
            _, headers, events = await post(near, "/v1/chat/completions", CHAT | STREAM | IDS)
            assert headers["X-Edge-Runtime-Answered-By"] == "draft"
            chunks = [json.loads(event.data) for event in events[:-1]]
            assert all(chunk["edge_runtime"]["answered_by"] == "draft" for chunk in chunks)
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            async with openai.AsyncOpenAI(base_url=near + "/v1", api_key="none") as client:
                assert [model.id async for model in client.models.list()] == ["tiny"]
                answer = await client.chat.completions.create(
                    model="tiny", messages=CHAT["messages"], max_tokens=3
                )  # type: ignore[arg-type]
                assert answer.model_extra is not None
                assert answer.model_extra["edge_runtime"]["answered_by"] == "draft"
            status, _, answer = await post(near, "/v1/completions", COMPLETION | {"surprise": 1})
            assert (status, answer["error"]["code"]) == (503, "unreachable")
            assert "surprise" in answer["error"]["message"]

    async def test_a_stream_that_breaks_for_good_is_marked_from_there_on(
        self, url: str, service: FakeService, draft: Path
    ) -> None:
        proxy = BreakingProxy(int(url.rpartition(":")[2]))
        async with proxy as broken, local(broken, draft=draft, offline="draft", resume_seconds=0.2) as near:
            await post(near, "/v1/completions", COMPLETION)
            service.hold = asyncio.Event()
            asked = COMPLETION | STREAM | IDS | {"ignore_eos": True}
            asking = asyncio.create_task(post(near, "/v1/completions", asked))
            await service.all_running(1)
            await asyncio.sleep(0.3)  # the first id is here
            await proxy.__aexit__()
            _, headers, events = await asking
        chunks = [json.loads(event.data) for event in events[:-1]]
        ids = [each for chunk in chunks for each in chunk["choices"][0].get("token_ids", ())]
        assert "X-Edge-Runtime-Answered-By" not in headers
        assert len(ids) == 5
        assert ids[0] == ord("a") + 3
        assert "edge_runtime" not in chunks[1]
        assert {chunk["edge_runtime"]["target_tokens"] for chunk in chunks[2:]} == {1}


async def test_a_drafter_that_does_not_fit_is_given_up_and_the_request_is_not(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
    direct = await post(url, "/v1/completions", COMPLETION)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        async with local(url, draft=other) as near:
            for _ in range(2):
                through = await post(near, "/v1/completions", COMPLETION)
                assert without_names(through[2]) == without_names(direct[2])
    assert [record.message for record in caplog.records if "another tokenizer" in record.message] == [
        caplog.records[0].message
    ]


async def test_an_address_that_is_taken_and_a_drafter_that_is_none_are_said_at_once(url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="can't listen"):
            await serve(LocalApiConfig(url, draft="suffix", port=taken.getsockname()[1]))
    with pytest.raises(UsageError, match="no drafter"):
        await serve(LocalApiConfig(url, draft="sufix"))
