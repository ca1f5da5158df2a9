"""The clients against the real HTTP application, over a service that shifts the alphabet."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

import edge_runtime
from coordinator.api.app import serve
from edge_runtime import AsyncClient, Client
from edge_runtime.errors import (
    CapacityError,
    EdgeRuntimeError,
    EngineError,
    RequestFailed,
    TransportError,
    TrustError,
    UsageError,
)
from edge_runtime.sdk.http import error_of
from edge_runtime.sdk.sse import SseParser
from tests.support.api_server import ADMIN_KEY as KEY
from tests.support.api_server import USER_KEY, serving
from tests.support.breaking_proxy import BreakingProxy
from tests.support.fake_service import ENCODER, FakeService
from tests.support.threaded_api import threaded_api


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def port(service: FakeService) -> AsyncIterator[int]:
    async with serving(service) as server:
        yield server.port


@pytest.fixture
async def client(port: int) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"http://127.0.0.1:{port}", api_key=KEY) as client:
        yield client


class TestAsyncClient:
    async def test_generate_returns_text_ids_reason_and_timings(self, client: AsyncClient) -> None:
        result = await client.generate("abc", max_tokens=5, temperature=0, seed=3)
        assert len(result.token_ids) == 5
        assert result.text == bytes(result.token_ids).decode()
        assert result.finish_reason == "length"
        assert result.prompt_token_ids == tuple(b"abc")
        assert result.seed == 3
        assert result.model == "tiny"
        assert result.request_id.startswith("cmpl-")
        assert 0 < result.timings.ttft_seconds <= result.timings.total_seconds

    async def test_the_same_seed_gives_the_same_and_another_one_another(self, client: AsyncClient) -> None:
        results = [await client.generate("abc", max_tokens=5, seed=seed) for seed in (1, 1, 2)]
        assert results[0].token_ids == results[1].token_ids != results[2].token_ids

    async def test_stream_yields_ids_and_text(self, client: AsyncClient) -> None:
        stream = client.stream("abc", max_tokens=4, seed=1)
        tokens = [token async for token in stream]
        assert [token.index for token in tokens] == [0, 1, 2, 3]
        assert "".join(token.text for token in tokens) == stream.result.text
        assert tuple(token.id for token in tokens) == stream.result.token_ids
        assert stream.result.finish_reason == "length"

    async def test_token_ids_are_a_prompt_too(self, client: AsyncClient) -> None:
        assert (await client.generate([97, 98], max_tokens=1)).prompt_token_ids == (97, 98)

    async def test_chat_takes_messages_or_one_text(self, client: AsyncClient) -> None:
        result = await client.chat([{"role": "user", "content": "hi"}], max_tokens=3, seed=1)
        again = await client.chat("hi", max_tokens=3, seed=1)
        assert result.text
        assert result.token_ids == again.token_ids
        assert result.prompt_token_ids == tuple(b"<user>hi<assistant>")

    async def test_leaving_a_stream_cancels_the_generation(
        self, client: AsyncClient, service: FakeService
    ) -> None:
        service.hold = asyncio.Event()
        async with client.stream("abc", max_tokens=50) as stream:
            async for _ in stream:
                break
        async with asyncio.timeout(5):
            await service.all_closed.wait()
        assert service.closed

    async def test_what_an_administrator_may_ask(self, client: AsyncClient, service: FakeService) -> None:
        status = await client.status()
        assert [device["name"] for device in status["devices"]] == ["phone", "laptop", "old-tablet"]
        assert (await client.create_join_link()).startswith("edge://")
        await client.revoke("phone")
        assert service.revoked == ["phone"]
        await client.ready()
        assert [model["id"] for model in await client.models()] == ["tiny"]

    async def test_ready_says_why_not(self, client: AsyncClient, service: FakeService) -> None:
        service.probe_error = EdgeRuntimeError("no device is paired")
        with pytest.raises(TransportError, match="no device is paired"):
            await client.ready()

    async def test_errors_keep_the_code_and_the_message(self, client: AsyncClient, port: int) -> None:
        with pytest.raises(CapacityError) as caught:
            await client.generate("x" * 500, max_tokens=5)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(UsageError, match="temperature"):
            await client.generate("x", temperature=9)
        async with AsyncClient(f"http://127.0.0.1:{port}", api_key=USER_KEY) as user:
            with pytest.raises(TrustError) as refused:
                await user.status()
        assert refused.value.code == "not_permitted"
        async with AsyncClient(f"http://127.0.0.1:{port}", api_key="sk-edge-wrong-00000000000") as stranger:
            with pytest.raises(TrustError) as unknown:
                await stranger.generate("x")
        assert unknown.value.code == "invalid_api_key"

    async def test_an_error_in_the_middle_of_a_stream_is_raised_and_not_retried(
        self, client: AsyncClient, service: FakeService
    ) -> None:
        service.error, service.error_after = RequestFailed("the tail died", code="request_failed"), 2
        stream = client.stream("abc", max_tokens=5)
        with pytest.raises(RequestFailed, match="the tail died"):
            await anext_all(stream)
        assert stream.resumed == 0

    async def test_unknown_options_are_refused_by_name(self, client: AsyncClient) -> None:
        with pytest.raises(UsageError, match="'temprature'") as caught:
            client.stream("x", temprature=1)  # type: ignore[call-arg]
        assert "temperature" in caught.value.hint

    async def test_nobody_there_is_said_with_a_hint(self, unused_tcp_port: int) -> None:
        async with AsyncClient(f"http://127.0.0.1:{unused_tcp_port}") as client:
            with pytest.raises(TransportError, match="nothing answers") as caught:
                await client.generate("x")
        assert "edge-runtime coordinator" in caught.value.hint

    async def test_embeddings(self, port: int, client: AsyncClient, service: FakeService) -> None:
        service.model = ENCODER
        vectors = await client.embed(["a", "bc"])
        assert [len(vector) for vector in vectors] == [4, 4]
        assert await client.embed([]) == []
        with pytest.raises(UsageError, match="encoder"):
            await client.generate("x")


async def anext_all(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("kind", ["generate", "chat"])
async def test_a_stream_that_breaks_anywhere_goes_on_with_the_same_tokens(
    port: int, client: AsyncClient, kind: str
) -> None:
    whole = await getattr(client, kind)("héllo", max_tokens=12, seed=5)
    for cut in (700, 1500, 2500, 3300):
        proxy = BreakingProxy(port)
        async with proxy as url, AsyncClient(url, api_key=KEY) as client:
            await client.model()
            await client.close()  # or the model's connection would be used for the stream
            proxy.cut_after = [cut, 1000, 600]
            stream = getattr(client, "stream" if kind == "generate" else "stream_chat")(
                "héllo", max_tokens=12, seed=5
            )
            await anext_all(stream)
            await client.close()
        assert stream.result.token_ids == whole.token_ids
        assert stream.result.text == whole.text
        assert stream.result.finish_reason == whole.finish_reason
        assert stream.resumed >= 1


async def test_an_overloaded_coordinator_is_asked_again() -> None:
    asked = []

    async def refuse_once(request: web.Request) -> web.Response:
        asked.append(request)
        if len(asked) == 1:
            body = {"error": {"message": "full", "code": "overloaded"}}
            return web.json_response(body, status=429, headers={"Retry-After": "0"})
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.router.add_get("/v1/models", refuse_once)
    runner, port = await serve(app)
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        assert await client.model() == "m"
    await runner.cleanup()


@pytest.fixture
def url() -> Iterator[str]:
    with threaded_api(FakeService()) as url:
        yield url


class TestClient:
    def test_it_needs_no_event_loop(self, url: str) -> None:
        with Client(url, api_key=KEY) as client:
            result = client.generate("abc", max_tokens=4, seed=2)
            stream = client.stream("abc", max_tokens=4, seed=2)
            assert tuple(token.id for token in stream) == result.token_ids
            assert stream.result.text == result.text
            assert client.chat("hi", max_tokens=2).text
            assert client.model() == "tiny"
        assert not [t for t in threading.enumerate() if t.name == "edge-runtime-client"]

    async def test_it_works_inside_a_loop_too(self, port: int) -> None:
        def use() -> str:
            with Client(f"http://127.0.0.1:{port}", api_key=KEY) as client:
                return client.generate("abc", max_tokens=4).finish_reason

        assert await asyncio.to_thread(use) == "length"

    def test_a_stream_can_be_left(self, url: str) -> None:
        with Client(url, api_key=KEY) as client:
            with client.stream("abc", max_tokens=10) as stream:
                next(stream)
            assert len(stream.result.token_ids) == 1
            client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.generate("x")

    def test_many_threads_share_one_client(self, url: str) -> None:
        with Client(url, api_key=KEY) as client:
            results: list[object] = []
            threads = [
                threading.Thread(
                    target=lambda: results.append(client.generate("a", max_tokens=3, seed=1).token_ids)
                )
                for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(results) == 8
        assert len(set(results)) == 1


def test_the_public_surface_is_this_and_no_more() -> None:
    assert edge_runtime.__all__ == [
        "Agent",
        "AsyncClient",
        "AsyncRemoteVerifier",
        "Client",
        "DeviceSpec",
        "EdgeRuntimeError",
        "LocalCluster",
        "RemoteVerifier",
        "Result",
        "StreamToken",
        "Timings",
        "Upgrade",
    ]
    for name in edge_runtime.__all__:
        assert getattr(edge_runtime, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = edge_runtime.Nothing  # type: ignore[attr-defined]


def test_sse_events_survive_any_cut() -> None:
    raw = b': hello\n\nid: a/1\ndata: {"x": 1}\n\nevent: status\r\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\n'
    expected = list(SseParser().feed(raw))
    assert [(event.id, event.name, event.data) for event in expected] == [
        ("a/1", "", '{"x": 1}'),
        ("", "status", "one\ntwo"),
        ("", "", "[DONE]"),
    ]
    for size in (1, 2, 3, 7):
        parser = SseParser()
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert [event for piece in pieces for event in parser.feed(piece)] == expected


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", CapacityError),
        (401, "invalid_api_key", TrustError),
        (404, "model_not_found", UsageError),
        (503, "engine", EngineError),
        (500, "internal_error", RequestFailed),
    ],
)
def test_api_codes_become_our_errors(status: int, code: str, kind: type[EdgeRuntimeError]) -> None:
    error = error_of(status, {"error": {"message": "m", "code": code, "hint": "h"}})
    assert type(error) is kind
    assert (error.message, error.code, error.hint) == ("m", code, "h")
    assert error_of(502, None).message == "the coordinator answered with HTTP status 502"
