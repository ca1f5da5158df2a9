"""Clients that draft, against the real HTTP application, over a service that shifts the alphabet."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from aiohttp import web

from coordinator.api.app import serve
from edge_runtime import AsyncClient, Client
from edge_runtime.errors import CapacityError, RequestFailed, TransportError, TrustError, UsageError
from edge_runtime.sdk.drafting import MAX_DRAFTED
from tests.support.api_server import ADMIN_KEY as KEY
from tests.support.breaking_proxy import BreakingProxy
from tests.support.coordinator_world import until
from tests.support.drafting import REPEATED, drafter_threads
from tests.support.fake_service import FakeService
from tests.support.threaded_api import threaded_api


@pytest.mark.parametrize("kind", ["generate", "chat"])
async def test_results_are_those_without_drafts(url: str, kind: str) -> None:
    options = {"max_tokens": 9, "seed": 5, "stop": "jk", "temperature": 0.5, "logit_bias": {3: 1.0}}
    async with (
        AsyncClient(url, api_key=KEY) as plain,
        AsyncClient(url, api_key=KEY, draft="suffix") as client,
    ):
        expected = await getattr(plain, kind)("abc", **options)
        found = await getattr(client, kind)("abc", **options)
    assert found.token_ids == expected.token_ids
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason) == ("fghi", "stop")
    assert (found.seed, found.model) == (5, "tiny")
    assert found.request_id
    assert not drafter_threads()


async def test_what_the_prompt_repeats_is_sent_as_drafts_that_are_right(
    url: str, service: FakeService
) -> None:
    service.hold = asyncio.Event()
    async with (
        AsyncClient(url, api_key=KEY, draft="auto") as client,
        client.stream(REPEATED, max_tokens=20, seed=1) as stream,
    ):
        assert (await anext(aiter(stream))).text == "b"
        await until(lambda: bool(service.drafts))
        service.hold.set()
        rest = [token.text async for token in stream]
    _, draft, source = service.drafts[0]
    assert source == "auto"
    assert draft.base_row == len(REPEATED) + 1
    assert bytes(draft.ids) == b"cdefghijklmnopqrst"[: len(draft.ids)]
    assert "".join(rest) == "cdefghijklmnopqrstu"


async def test_a_user_s_past_outputs_help_nobody_else(url: str, service: FakeService) -> None:
    """The prompt repeats nothing, so that only memory can know what follows."""
    async with (
        AsyncClient(url, api_key=KEY, draft="suffix") as other,
        AsyncClient(url, api_key=KEY, draft="suffix") as client,
    ):
        await client.generate("0", max_tokens=20, seed=1)
        service.drafts.clear()
        await other.generate("1", max_tokens=20, seed=1)
        assert not service.drafts
        service.hold = asyncio.Event()
        async with client.stream("2", max_tokens=20, seed=1) as stream:
            await anext(aiter(stream))
            await until(lambda: bool(service.drafts))
    assert not drafter_threads()


async def test_a_socket_that_breaks_anywhere_goes_on_with_the_same_tokens(
    url: str, service: FakeService
) -> None:
    async with AsyncClient(url, api_key=KEY) as plain:
        whole = await plain.generate(REPEATED, max_tokens=60, seed=1)
    for cut in (900, 960, 1000):
        proxy = BreakingProxy(int(url.rpartition(":")[2]))
        async with proxy as broken, AsyncClient(broken, api_key=KEY, draft="suffix") as client:
            await client.generate("a", max_tokens=1)  # the model and the tokenizer are known from here on
            service.hold = asyncio.Event()
            proxy.cut_after = [cut, 260]
            stream = client.stream(REPEATED, max_tokens=60, seed=1)
            tokens = [await anext(aiter(stream))]
            service.hold.set()
            tokens += [token async for token in stream]
        assert tuple(token.id for token in tokens) == whole.token_ids
        assert stream.result.text == whole.text
    assert not drafter_threads()


async def test_leaving_a_stream_cancels_the_generation_and_frees_the_drafter(
    url: str, service: FakeService
) -> None:
    service.hold = asyncio.Event()
    async with AsyncClient(url, api_key=KEY, draft="suffix") as client:
        async with client.stream("abc", max_tokens=50) as stream:
            async for _ in stream:
                break
        async with asyncio.timeout(5):
            await service.all_closed.wait()
        assert len(stream.result.token_ids) == 1
        unfinished = client.stream("abc", max_tokens=50)
        await anext(aiter(unfinished))
        await client.close()
        with pytest.raises(TransportError, match="closed"):
            await anext(aiter(unfinished))
    assert not drafter_threads()


async def test_more_at_once_than_this_device_drafts_for_come_without_drafts(
    url: str, service: FakeService
) -> None:
    """Before a verdict drafts are always tried, so none is reached before there is room once more."""
    service.hold = asyncio.Event()
    count = MAX_DRAFTED + 3

    def drafted() -> int:
        return len({request for request, _, _ in service.drafts})

    async with AsyncClient(url, api_key=KEY, draft="suffix") as client:
        for wave in (1, 2):
            asking = [
                asyncio.create_task(client.generate(REPEATED, max_tokens=9, seed=1)) for _ in range(count)
            ]
            await service.all_running(count)
            await until(lambda wave=wave: drafted() == wave * MAX_DRAFTED)
            assert len(drafter_threads()) == MAX_DRAFTED
            if wave == 1:
                for each in asking:
                    each.cancel()
                await asyncio.wait(asking)
                await until(lambda: not service.running)
        service.hold.set()
        results = [await each for each in asking]
        assert len({result.token_ids for result in results}) == 1
        assert drafted() == 2 * MAX_DRAFTED
    assert not drafter_threads()


async def test_errors_are_those_of_the_api(url: str, service: FakeService) -> None:
    async with AsyncClient(url, api_key=KEY, draft="suffix") as client:
        with pytest.raises(CapacityError) as caught:
            await client.generate("x" * 500, max_tokens=5)
        assert caught.value.code == "context_length_exceeded"
        service.error, service.error_after = RequestFailed("the tail died", code="request_failed"), 2
        stream = client.stream("abc", max_tokens=5)
        with pytest.raises(RequestFailed, match="the tail died"):
            async for _ in stream:
                pass
        assert stream.resumed == 0
    async with AsyncClient(url, api_key="sk-edge-wrong-00000000000", draft="suffix") as stranger:
        with pytest.raises(TrustError):
            await stranger.generate("x")


async def test_a_server_without_drafting_is_asked_as_ever_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events = 'data: {"id": "r", "choices": [{"text": "hi", "token_ids": [7], "finish_reason": "stop"}]}\n\n'

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def complete(request: web.Request) -> web.Response:
        return web.Response(text=events + "data: [DONE]\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    runner, port = await serve(app)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        async with AsyncClient(f"http://127.0.0.1:{port}", draft="suffix") as client:
            texts = [(await client.generate("x")).text for _ in range(2)]
    await runner.cleanup()
    assert texts == ["hi", "hi"]
    assert [record.message for record in caplog.records if "no drafting socket" in record.message] == [
        caplog.records[0].message
    ]


def test_it_needs_no_event_loop() -> None:
    with threaded_api(FakeService()) as url, Client(url, api_key=KEY, draft="suffix") as client:
        stream = client.stream(REPEATED, max_tokens=8, seed=1)
        assert "".join(token.text for token in stream) == "bcdefghi"
        with client.stream(REPEATED, max_tokens=30) as left:
            next(left)
        assert client.generate("a", max_tokens=2, seed=2).text == "cd"
    assert not drafter_threads()


def test_what_is_no_drafter_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'sufix' is no drafter"):
        AsyncClient(draft="sufix")


async def test_a_draft_model_of_another_tokenizer_is_refused(url: str) -> None:
    bundle = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
    async with AsyncClient(url, api_key=KEY, draft=bundle) as client:
        with pytest.raises(UsageError, match="another tokenizer"):
            await client.generate("x", max_tokens=2)
    assert not drafter_threads()
