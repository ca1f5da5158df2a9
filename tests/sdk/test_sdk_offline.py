"""Answers of the draft model alone: when, what they say, how they are marked, and what the target says later."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from coordinator.api.app import create_app, serve
from coordinator.api.errors import KINDS
from coordinator.api.keys import ApiKey, ApiKeys
from edge_runtime import AsyncClient, Client
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.sampler import Sampler
from edge_runtime.errors import EdgeRuntimeError, TransportError, TrustError, UsageError
from edge_runtime.sdk.http import NoWebSocket, error_of
from edge_runtime.sdk.results import first_difference
from edge_runtime.sdk.unreachable import is_unreachable
from tests.support.api_server import ADMIN_KEY as KEY
from tests.support.breaking_proxy import BreakingProxy
from tests.support.drafting import drafter_threads
from tests.support.fake_service import TOKENIZER_JSON, FakeService
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

DEMO = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
KV_BYTES = 1 << 20
PROMPT = [97, 98, 99, 97, 98]
OPTIONS = {"max_tokens": 12, "seed": 5, "temperature": 0.8, "ignore_eos": True}


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the fake service's tokenizer."""
    path = tmp_path_factory.mktemp("draft") / "bundle"
    build_tiny_bundle(path, TinyModel(layers=2, vocab=256, max_context=128), TOKENIZER_JSON).close()
    return path


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "bundle"
    tokenizer = TOKENIZER_JSON.replace(b'"e":101', b'"E":101')
    build_tiny_bundle(path, TinyModel(layers=2, vocab=256, max_context=128), tokenizer).close()
    return path


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens, and nothing else will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def written_alone(
    path: Path, prompt: Sequence[int], before: Sequence[int], options: dict[str, object]
) -> list[int]:
    """The reference: the model run whole for every id, sampled as a tail samples."""
    bundle = Bundle.open(path)
    stage = CpuStage.load(bundle, LayerRange(0, 1), threads=1, kv_budget_bytes=KV_BYTES, executor="native")
    params = SamplingParams(temperature=float(options["temperature"]), seed=int(options["seed"]))  # type: ignore[arg-type]
    sampler = Sampler(params, bundle.manifest.model.vocab_size)
    written = list(before)
    while len(written) < int(options["max_tokens"]):  # type: ignore[call-overload]
        sequence = (*prompt, *written)
        stage.open(SessionId(1), len(sequence))
        logits = stage.run(Batch((Span(SessionId(1), 0, sequence, 1),), None))[0]
        stage.drop(SessionId(1))
        written.append(sampler.sample(logits, len(sequence))[0])
    stage.close()
    bundle.close()
    return written[len(before) :]


@pytest.mark.parametrize("code", KINDS)
def test_only_a_server_that_can_not_serve_now_is_unreachable(code: str) -> None:
    problem = error_of(KINDS[code].status, {"error": {"message": "m", "code": code}})
    assert is_unreachable(problem) == (KINDS[code].status == 503)


def test_a_gateway_is_not_the_server_and_a_failure_of_ours_is_an_answer() -> None:
    assert is_unreachable(error_of(502, "<html>"))
    assert is_unreachable(error_of(504, None))
    assert not is_unreachable(error_of(500, None))
    assert not is_unreachable(error_of(404, "<html>"))
    assert is_unreachable(NoWebSocket(502))
    assert not is_unreachable(NoWebSocket(404))
    assert not is_unreachable(EdgeRuntimeError("x"))


async def test_without_leave_an_unreachable_target_is_an_error(nobody: str, draft: Path) -> None:
    async with AsyncClient(nobody, draft=draft) as client:
        with pytest.raises(TransportError, match="nothing answers"):
            await client.generate(PROMPT, **OPTIONS)
        with pytest.raises(UsageError, match="offline answers"):
            client.stream(PROMPT, offline="always")
        allowed = await client.generate(PROMPT, offline="draft", **OPTIONS)
    async with AsyncClient(nobody, draft=draft, offline="draft") as client:
        with pytest.raises(TransportError, match="nothing answers"):
            await client.generate(PROMPT, offline="never", **OPTIONS)
    assert allowed.answered_by == "draft"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_the_draft_model_answers_as_itself_and_says_so(
    nobody: str, draft: Path, temperature: float
) -> None:
    options = OPTIONS | {"temperature": temperature}
    async with AsyncClient(nobody, draft=draft, offline="draft") as client:
        stream = client.stream(PROMPT, **options)
        tokens = [token async for token in stream]
        again = await client.generate(PROMPT, **options)
    result = stream.result
    assert list(result.token_ids) == written_alone(draft, PROMPT, [], options)
    assert again.token_ids == result.token_ids
    assert stream.answered_by == result.answered_by == "draft"
    assert {token.answered_by for token in tokens} == {"draft"}
    assert "".join(token.text for token in tokens) == result.text
    assert [token.index for token in tokens] == list(range(12))
    assert (result.target_tokens, result.finish_reason, result.seed) == (0, "length", 5)
    assert result.prompt_token_ids == tuple(PROMPT)
    assert "nothing answers" in result.offline_reason
    assert not drafter_threads()


@pytest.mark.parametrize("drafter", ["none", "suffix", "path"])
async def test_a_link_that_stays_broken_leaves_the_target_s_tokens_and_the_draft_goes_on(
    url: str, service: FakeService, draft: Path, drafter: str
) -> None:
    proxy = BreakingProxy(int(url.rpartition(":")[2]))
    async with contextlib.AsyncExitStack() as stack:
        broken = await stack.enter_async_context(proxy)
        client = await stack.enter_async_context(
            AsyncClient(broken, api_key=KEY, draft=draft, offline="draft", resume_seconds=0.2)
        )
        if drafter != "path":  # the bundle answers offline, another guesses, or nobody
            client._drafting = AsyncClient(broken, api_key=KEY, draft=drafter)._drafting
            if client._drafting is not None:
                client._drafting.http = client._http
        await client.generate(PROMPT, max_tokens=1, offline="never")  # the model and the tokenizer are known
        service.hold = asyncio.Event()
        stream = client.stream(PROMPT, **OPTIONS)
        tokens = [await anext(aiter(stream))]
        assert stream.answered_by == tokens[0].answered_by == "target"
        await proxy.__aexit__()
        tokens += [token async for token in stream]
    told = [token.id for token in tokens if token.answered_by == "target"]
    result = stream.result
    assert told == [ord("a") + 5]
    assert list(result.token_ids) == told + written_alone(draft, PROMPT, told, OPTIONS)
    assert (result.answered_by, result.target_tokens, result.finish_reason) == ("draft", 1, "length")
    assert [token.index for token in tokens] == list(range(12))
    assert "".join(token.text for token in tokens) == result.text
    assert result.request_id
    assert not drafter_threads()


async def test_ids_of_another_tokenizer_are_not_gone_on_with(
    url: str, service: FakeService, other_tokenizer: Path
) -> None:
    proxy = BreakingProxy(int(url.rpartition(":")[2]))
    async with proxy as broken:
        client = AsyncClient(broken, api_key=KEY, offline="never", resume_seconds=0.2)
        client._draft = other_tokenizer
        service.hold = asyncio.Event()
        stream = client.stream(PROMPT, **OPTIONS | {"seed": 4}, offline="draft")
        assert (await anext(aiter(stream))).text == "e"
    with pytest.raises(TransportError, match="other text"):
        await anext(aiter(stream))
    assert stream.result.answered_by == "target"
    await client.close()


async def test_a_refused_request_is_an_answer(url: str, service: FakeService, draft: Path) -> None:
    async with AsyncClient(
        url, api_key="sk-edge-wrong-00000000000", draft=draft, offline="draft"
    ) as stranger:
        with pytest.raises(TrustError):
            await stranger.generate(PROMPT)
    async with AsyncClient(url, api_key=KEY, draft=draft, offline="draft") as client:
        with pytest.raises(EdgeRuntimeError) as caught:
            await client.generate(PROMPT * 30, max_tokens=5)
        assert caught.value.code == "context_length_exceeded"
        answered = await client.generate(PROMPT, **OPTIONS)
        assert (answered.answered_by, answered.target_tokens) == ("target", 12)
        assert not answered.offline_reason
        with pytest.raises(UsageError, match="the target's"):
            await client.upgrade(answered)


async def test_a_coordinator_without_a_plan_is_stood_in_for(
    url: str, service: FakeService, draft: Path
) -> None:
    service.ready = False
    async with AsyncClient(url, api_key=KEY, draft=draft, offline="draft") as client:
        assert (await client.generate(PROMPT, **OPTIONS)).answered_by == "draft"


async def test_an_unknown_name_and_a_silent_server_are_stood_in_for(draft: Path) -> None:
    left = asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await left.wait()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    silent = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    reasons = []
    for url in ("http://nobody.invalid:1", silent):
        async with AsyncClient(url, draft=draft, offline="draft", timeout_seconds=0.3) as client:
            answers = await asyncio.gather(*(client.generate(PROMPT, **OPTIONS) for _ in range(5)))
        assert len({each.token_ids for each in answers}) == 1
        assert {each.answered_by for each in answers} == {"draft"}
        reasons.append(answers[0].offline_reason)
    left.set()
    server.close()
    await server.wait_closed()
    assert "nobody.invalid" in reasons[0]
    assert "broke" in reasons[1]
    assert not drafter_threads()


async def test_an_answer_is_upgraded_when_the_link_is_back(draft: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}", api_key=KEY, draft=draft, offline="draft") as client:
        offline = await client.generate(PROMPT, max_tokens=12, ignore_eos=True)
        with pytest.raises(TransportError):
            await client.upgrade(offline)  # and never the draft model again
        app = create_app(FakeService(), api_keys=ApiKeys([ApiKey.of(KEY)]))
        runner, _ = await serve(app, port=port)
        try:
            upgrade = await client.upgrade(offline)
            target = await client.generate(PROMPT, max_tokens=12, ignore_eos=True, seed=offline.seed)
        finally:
            await client.close()
            await runner.cleanup()
    assert upgrade.result.answered_by == "target"
    assert upgrade.result.token_ids == target.token_ids
    assert upgrade.result.seed == offline.seed
    assert upgrade.first_difference == first_difference(offline.token_ids, target.token_ids)


def test_first_difference() -> None:
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2
    assert first_difference((), (4,)) == 0


def test_a_conversation_and_stop_strings_without_an_event_loop(nobody: str) -> None:
    with Client(nobody, draft=DEMO, offline="draft") as client:
        options = {"max_tokens": 24, "temperature": 0.0}
        text = client.generate("def add(a, b):", **options)
        chat = client.chat([{"role": "user", "content": "def add(a, b):"}], **options)
        stop = text.text[5:8]
        cut = client.generate("def add(a, b):", stop=stop, **options)
        with client.stream("def", **options) as left:
            next(left)
    assert text.model == chat.model == "demo"
    assert len(chat.token_ids) == 24
    assert chat.answered_by == "draft"
    assert cut.text == text.text[: text.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == text.token_ids[: len(cut.token_ids)]
    assert not drafter_threads()


async def test_what_the_draft_model_can_not_hold_says_both_reasons(nobody: str, draft: Path) -> None:
    async with AsyncClient(nobody, draft=draft, offline="draft") as client:
        with pytest.raises(TransportError, match=r"nothing answers.*context is 128 tokens"):
            await client.generate(PROMPT * 30, max_tokens=5)


async def test_a_conversation_without_what_renders_it_says_what_to_install(
    nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "edge_runtime.chat_template", raising=False)
    for name in ("jinja2", "jinja2.sandbox"):
        monkeypatch.setitem(sys.modules, name, None)
    async with AsyncClient(nobody, draft=DEMO, offline="draft") as client:
        with pytest.raises(TransportError, match=r"nothing answers.*needs jinja2") as caught:
            await client.chat("hello", max_tokens=2)
        assert "pip install" in caught.value.hint
        answer = await client.generate("def f(", max_tokens=2)
        assert answer.answered_by == "draft"


def test_who_can_not_answer_offline_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds none"):
        AsyncClient(draft=tmp_path, offline="draft")
