"""The local API against the coordinator's own, both on real sockets over one service: the same fields, everywhere."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from edge_runtime.errors import CapacityError, RequestFailed, UsageError
from edge_runtime.local_api.server import LocalApiConfig, serve
from edge_runtime.sdk.drafting import MAX_DRAFTED
from tests.support.api_server import ADMIN_KEY, OTHER_KEY, USER_KEY
from tests.support.breaking_proxy import BreakingProxy
from tests.support.coordinator_world import until
from tests.support.drafting import REPEATED, drafter_threads
from tests.support.fake_service import FakeService
from tests.support.local_api import (
    CHAT,
    COMPLETION,
    IDS,
    STREAM,
    USAGE,
    all_headers,
    local,
    post,
    without_names,
)


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
