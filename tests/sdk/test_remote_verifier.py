"""Greedy drafts against a real server with a real model, in every dialect, on good days and on bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import logging
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tokenizers import Tokenizer

from edge_runtime.errors import (
    CapacityError,
    ConfigError,
    ConnectionClosed,
    ProtocolError,
    TransportError,
    TrustError,
    UsageError,
)
from edge_runtime.sdk import verifier_link
from edge_runtime.sdk.async_verifier import AsyncRemoteVerifier
from edge_runtime.sdk.verifier_link import LinkOptions
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from edge_runtime.speculative.verifiers import pace
from tests.support.drafting import drafter_threads
from tests.support.model_server import DEMO, ModelServer, model_server

COPY = """def total(values):
    result = 0
    for value in values:
        result += value
    return result


def total(values):
    result = 0
"""
ENDING = "def main():\n    print('x')\n\n\nif __name__"  # the model ends its text soon after
KEY = "sk-secret-0123456789"
WAYS = [("vllm", "vllm"), ("vllm", "prefixes"), ("vllm", "echo"), ("vllm", "auto"), ("sglang", "auto")]

Serve = Callable[..., Awaitable[ModelServer]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve("sglang")`: servers that live as long as the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(owner: str = "vllm", **options: object) -> ModelServer:
            return await stack.enter_async_context(model_server(owner, **options))  # type: ignore[arg-type]

        yield make
    assert not drafter_threads()


def verifier_of(server: ModelServer, **options: object) -> AsyncRemoteVerifier:
    return AsyncRemoteVerifier(server.url, **{"tokenizer": DEMO, "draft": "suffix", **options})  # type: ignore[arg-type]


_PLAIN: dict[tuple[str, int], list[int]] = {}


async def plain(server: ModelServer, prompt: str, count: int) -> list[int]:
    """What every one of these servers decodes by itself: the same model, so worked out once."""
    if (prompt, count) not in _PLAIN:
        _PLAIN[prompt, count] = await server.plain(prompt, count)
    return _PLAIN[prompt, count]


def eager(verifier: AsyncRemoteVerifier) -> None:
    """Measured as a server that takes long for every token of a stream, so that every draft is worth sending."""
    for _ in range(200):
        verifier._pace.stream_began(1.0)
        verifier._pace.streamed(1, 1.0)


class TestSameIds:
    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_ids_are_those_that_the_server_decodes_by_itself(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        server = await serve(owner)
        copied = (
            80 if dialect in ("vllm", "echo") else 200
        )  # those two have the server compute all of it each time
        for prompt, count in ((COPY, copied), ('"""Doc."""\n', 60)):
            expected = (await plain(server, prompt, 200))[:count]
            async with verifier_of(server, dialect=dialect) as verifier:
                stream = verifier.stream(prompt, max_tokens=count)
                await anext(aiter(stream))
                eager(verifier)
                async for _ in stream:
                    pass
            assert list(stream.result.token_ids) == expected
            assert stream.result.text == server.tokenizer.decode(expected)
            assert stream.result.finish_reason == "length"
            assert stream.usage.windows > 2
            assert stream.usage.accepted_drafts > 10

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_drafts_that_are_wrong_cost_time_and_change_nothing(
        self, serve: Serve, owner: str, dialect: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A third of them, where nobody can foresee."""
        honest = SuffixDrafter.propose
        coin = random.Random(5)

        def unreliable(self: SuffixDrafter, count: int, width: int = 1) -> Proposal:
            found = honest(self, count, width)
            ids = tuple((token + (coin.random() < 0.3)) % 4096 for token in found.ids)
            return replace(found, ids=ids)

        monkeypatch.setattr(SuffixDrafter, "propose", unreliable)
        monkeypatch.setattr(pace, "LEAST_AHEAD", 0.0)  # a second window is sent, however unlikely
        server = await serve(owner)
        expected = (await plain(server, COPY, 200))[:60]
        async with verifier_of(server, dialect=dialect) as verifier:
            await verifier.server()
            eager(verifier)
            stream = verifier.stream(COPY, max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == expected
        assert stream.usage.rejected_drafts > 5
        assert server.most_at_once <= 3  # two windows, and one that was given up and still runs

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_a_text_ends_where_the_server_would_end_it(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        """The end itself is drafted: the same text with its end stands in the prompt."""
        server = await serve(owner)
        encode = server.tokenizer.encode
        ids = encode(ENDING).ids
        end = await server.plain(ids, 100)
        assert end[-1] == 0
        assert len(end) == 11
        prompt = [*ids, *end, *ids]
        expected = await server.plain(prompt, 100)
        assert expected[-1] == 0
        async with verifier_of(server, dialect=dialect) as verifier:
            await verifier.server()
            eager(verifier)
            for again in range(2):  # what the special token means is learnt the first time
                before = verifier.requests
                result = await verifier.generate(prompt, max_tokens=100)
                assert list(result.token_ids) == expected
                assert result.finish_reason == "stop"
                assert result.accepted_draft_tokens > 3
                if again:
                    assert verifier.requests - before < 4
            longer = await verifier.generate(prompt, max_tokens=30, ignore_eos=True)
            assert len(longer.token_ids) == 30
            assert list(longer.token_ids[: len(expected)]) == expected

    async def test_an_end_that_is_no_special_token_is_named_by_the_caller(self, serve: Serve) -> None:
        server = await serve("sglang")
        whole = (await plain(server, COPY, 200))[:80]
        end = whole[60]
        server.ends = (0, end)
        expected = whole[: whole.index(end) + 1]
        async with verifier_of(server, stop_token_ids=[end]) as verifier:
            await verifier.server()
            eager(verifier)
            result = await verifier.generate(COPY, max_tokens=80)
        assert list(result.token_ids) == expected
        assert result.finish_reason == "stop"

    async def test_stop_strings_end_the_text_before_them(self, serve: Serve) -> None:
        server = await serve("vllm")
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            whole = await verifier.generate(COPY, max_tokens=60)
            stop = whole.text[40:46]
            found = await verifier.generate(COPY, max_tokens=60, stop=stop)
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finish_reason == "stop"

    async def test_a_context_that_is_full_ends_the_text(self, serve: Serve) -> None:
        server = await serve("sglang")
        prompt = (server.tokenizer.encode(COPY).ids * 40)[:1010]
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            result = await verifier.generate(prompt, max_tokens=100)
            assert len(result.token_ids) == 14
            assert result.finish_reason == "length"
            with pytest.raises(CapacityError) as caught:
                await verifier.generate(prompt + prompt[:14], max_tokens=1)
            assert caught.value.code == "context_length_exceeded"


class TestWhatItCosts:
    @pytest.mark.parametrize("owner", ["vllm", "sglang"])
    async def test_a_copy_takes_far_fewer_requests_than_tokens(self, serve: Serve, owner: str) -> None:
        server = await serve(owner)
        server.faults.token_seconds = (
            0.03  # a large model: a token takes long, a window no longer than a token
        )
        async with verifier_of(server) as verifier:
            stream = verifier.stream(COPY, max_tokens=120)
            async for _ in stream:
                pass
        assert stream.usage.requests / len(stream.result.token_ids) < 0.5
        assert stream.usage.accepted_drafts > 60

    async def test_sglang_computes_drafts_alone_and_vllm_s_log_probabilities_everything(
        self, serve: Serve
    ) -> None:
        computed = {}
        for owner, dialect in (("sglang", "sglang"), ("vllm", "vllm"), ("vllm", "prefixes")):
            server = await serve(owner)
            prompt = server.tokenizer.encode(COPY * 3).ids
            async with verifier_of(server, dialect=dialect) as verifier:
                await verifier.server()
                eager(verifier)
                before = server.brain.computed_rows
                stream = verifier.stream(prompt, max_tokens=120)
                async for _ in stream:
                    pass
            computed[dialect] = (server.brain.computed_rows - before - len(prompt)) / 120
            if dialect != "vllm":
                assert stream.usage.cached_tokens > 0.5 * stream.usage.prompt_tokens
        assert computed["sglang"] < 3
        assert computed["prefixes"] < 8
        assert computed["vllm"] > 6

    async def test_drafts_that_bring_nothing_leave_the_server_s_own_stream(self, serve: Serve) -> None:
        """k = 0: a fast server far away."""
        server = await serve("vllm")
        server.faults.seconds = 0.15
        async with verifier_of(server) as verifier:
            stream = verifier.stream("import os\n\n\nprint(", max_tokens=30)
            async for _ in stream:
                pass
        assert stream.usage.requests <= 4

    async def test_while_drafts_are_right_the_next_window_is_on_its_way(self, serve: Serve) -> None:
        server = await serve("sglang")
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            before = server.most_at_once
            server.faults.company_seconds = (
                1.0  # longer than a window takes to draft, however busy the machine
            )
            stream = verifier.stream(COPY, max_tokens=200)
            async for _ in stream:
                pass
        server.faults.company_seconds = 0.0
        assert list(stream.result.token_ids) == await plain(server, COPY, 200)
        assert (before, server.most_at_once) == (1, 2)

    async def test_no_drafter_at_all_is_one_request(self, serve: Serve) -> None:
        server = await serve("sglang")
        async with verifier_of(server, draft="none") as verifier:
            stream = verifier.stream(COPY, max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == (await plain(server, COPY, 200))[:60]
        assert stream.usage.requests == 1

    async def test_a_draft_model_with_the_same_tokenizer_drafts_what_is_new(self, serve: Serve) -> None:
        server = await serve("sglang")
        server.faults.token_seconds = 0.05
        async with verifier_of(server, draft=DEMO) as verifier:
            stream = verifier.stream("def add(a, b):\n    return a", max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == await server.plain("def add(a, b):\n    return a", 60)
        assert stream.usage.requests < 30
        assert stream.usage.accepted_drafts > 25


class TestRefused:
    @pytest.mark.parametrize("dialect", ["vllm", "echo", "sglang"])
    async def test_a_server_without_prompt_log_probabilities(self, serve: Serve, dialect: str) -> None:
        server = await serve("sglang" if dialect == "sglang" else "vllm")
        server.faults.no_logprobs = True
        async with verifier_of(server, dialect=dialect) as verifier:
            with pytest.raises(ProtocolError, match=r"log-probabilities|likeliest") as caught:
                await verifier.generate(COPY)
        assert caught.value.code == "no_prompt_logprobs"
        assert caught.value.hint

    async def test_a_server_with_nothing_to_verify_with_says_what_was_tried(self, serve: Serve) -> None:
        server = await serve("other")
        server.faults.no_logprobs = server.faults.no_token_ids = True
        server.tokenizer = _renamed(server.tokenizer)
        async with verifier_of(server) as verifier:
            with pytest.raises(ProtocolError, match="can't verify drafts") as caught:
                await verifier.generate(COPY)
        for name in ("vllm", "prefixes", "sglang", "echo"):
            assert f"{name}:" in caught.value.message

    @pytest.mark.parametrize(
        ("owner", "dialect"), [("vllm", "vllm"), ("vllm", "auto"), ("sglang", "auto"), ("vllm", "echo")]
    )
    @pytest.mark.parametrize("lie", ["accept", "reject", "contradict"])
    async def test_ranks_that_are_not_the_model_s(
        self, serve: Serve, owner: str, dialect: str, lie: str
    ) -> None:
        server = await serve(owner)
        server.faults.lie = lie
        async with verifier_of(server, dialect=dialect) as verifier:
            with pytest.raises(ProtocolError) as caught:
                await verifier.generate(COPY)
        assert caught.value.code == "inconsistent_logprobs"

    async def test_log_probabilities_that_are_not_numbers(self, serve: Serve) -> None:
        server = await serve("vllm")
        server.faults.nan = True
        async with verifier_of(server, dialect="vllm") as verifier:
            with pytest.raises(ProtocolError):
                await verifier.generate(COPY)

    @pytest.mark.parametrize(("owner", "dialect"), [*WAYS, ("vllm", "vllm")])
    @pytest.mark.parametrize("no_tokenize", [False, True])
    async def test_another_tokenizer(
        self, serve: Serve, owner: str, dialect: str, no_tokenize: bool, tmp_path: Path
    ) -> None:
        server = await serve(owner)
        server.faults.no_tokenize = no_tokenize
        other = json.loads(server.bundle.tokenizer_json())
        other["model"]["merges"] = other["model"]["merges"][:-2000]
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        async with verifier_of(server, dialect=dialect, tokenizer=tmp_path) as verifier:
            with pytest.raises(UsageError, match="another") as caught:
                await verifier.generate(COPY)
        assert caught.value.code == "other_tokenizer"

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_the_same_tokenizer_is_known_without_an_endpoint_for_it(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        server = await serve(owner)
        server.faults.no_tokenize = True
        async with verifier_of(server, dialect=dialect) as verifier:
            assert (await verifier.generate(COPY, max_tokens=5)).token_ids

    async def test_sampling_and_what_else_is_not_greedy(self, serve: Serve) -> None:
        server = await serve("vllm")
        async with verifier_of(server) as verifier:
            with pytest.raises(UsageError, match="can't sample") as caught:
                await verifier.generate(COPY, temperature=0.7)
            assert caught.value.code == "sampling_not_supported"
            with pytest.raises(UsageError, match="'top_p'"):
                await verifier.generate(COPY, top_p=0.5)  # type: ignore[call-arg]
            with pytest.raises(UsageError, match="empty"):
                await verifier.generate([])
        assert not [body for body in server.bodies if body["temperature"] != 0]

    async def test_what_can_be_seen_at_once(self, serve: Serve, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="unknown dialect"):
            AsyncRemoteVerifier("http://127.0.0.1:1", tokenizer=DEMO, dialect="ollama")
        with pytest.raises(UsageError, match="no address"):
            AsyncRemoteVerifier("127.0.0.1:8000", tokenizer=DEMO)
        with pytest.raises(UsageError, match="no drafter"):
            AsyncRemoteVerifier("http://127.0.0.1:1", tokenizer=DEMO, draft="sufix")
        with pytest.raises(ConfigError, match="no tokenizer"):
            AsyncRemoteVerifier("http://127.0.0.1:1", tokenizer=tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ConfigError, match="no tokenizer"):
            AsyncRemoteVerifier("http://127.0.0.1:1", tokenizer=tmp_path)
        async with AsyncRemoteVerifier("http://127.0.0.1:1", tokenizer=DEMO) as verifier:
            with pytest.raises(TransportError, match="nothing answers"):
                await verifier.generate(COPY)
        server = await serve("vllm")
        async with verifier_of(server, model="llama") as verifier:
            with pytest.raises(UsageError, match="no model 'llama'") as caught:
                await verifier.generate(COPY)
            assert "demo" in caught.value.hint


class TestBadDays:
    @pytest.mark.parametrize("status", [429, 503])
    async def test_later_is_waited_for(self, serve: Serve, status: int) -> None:
        server = await serve("sglang")
        expected = (await plain(server, COPY, 200))[:60]
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            server.faults.later, server.faults.later_status = 3, status
            assert list((await verifier.generate(COPY, max_tokens=60)).token_ids) == expected
            assert server.faults.later == 0

    async def test_a_wait_that_is_too_long_is_not_begun(self, serve: Serve) -> None:
        server = await serve("sglang")
        async with verifier_of(server) as verifier:
            await verifier.server()
            server.faults.later, server.faults.retry_after = 1, "3600"
            async with asyncio.timeout(5):
                with pytest.raises(CapacityError, match="busy"):
                    await verifier.generate(COPY)

    async def test_a_silent_server_is_given_up(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verifier_link, "MAX_RETRIES", 1)
        server = await serve("vllm")
        async with verifier_of(server, timeout_seconds=0.2) as verifier:
            server.faults.silent = True
            async with asyncio.timeout(10):
                with pytest.raises(ConnectionClosed, match="silent"):
                    await verifier.generate(COPY)

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_answers_and_streams_that_break_off_are_asked_for_again(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        server = await serve(owner)
        expected = (await plain(server, COPY, 200))[:80]
        async with verifier_of(server, dialect=dialect) as verifier:
            await verifier.server()
            server.faults.cut_after_events = 3
            stream = verifier.stream(COPY, max_tokens=80)
            tokens = [await anext(aiter(stream)) for _ in range(6)]
            eager(verifier)
            server.faults.cut_answers = 2
            tokens += [token async for token in stream]
        assert [token.id for token in tokens] == expected
        assert stream.resumed == 1
        assert server.faults.cut_answers == 0

    async def test_either_way_of_streaming_is_read(self, serve: Serve) -> None:
        server = await serve("sglang")
        server.faults.incremental = True
        async with verifier_of(server, draft="none") as verifier:
            result = await verifier.generate(COPY, max_tokens=40)
        assert list(result.token_ids) == (await plain(server, COPY, 200))[:40]

    async def test_leaving_a_stream_stops_the_server_and_frees_the_drafter(self, serve: Serve) -> None:
        server = await serve("vllm")
        server.faults.token_seconds = 0.01
        async with verifier_of(server, draft="none") as verifier:
            async with verifier.stream(COPY, max_tokens=900) as stream:
                async for _ in stream:
                    break
            before = server.brain.computed_rows
            assert len((await verifier.generate("import os\n\n\nprint(", max_tokens=5)).token_ids) == 5
            assert server.brain.computed_rows - before < 100

    async def test_requests_at_the_same_time_take_turns(self, serve: Serve) -> None:
        server = await serve("vllm")
        prompts = (COPY, "import os\n\n\nprint(")
        expected = [await server.plain(prompt, 40) for prompt in prompts]
        async with verifier_of(server) as verifier:
            found = await asyncio.gather(*(verifier.generate(prompt, max_tokens=40) for prompt in prompts))
        assert [list(result.token_ids) for result in found] == expected


class TestKeys:
    async def test_a_key_is_sent_and_never_logged(
        self, serve: Serve, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = await serve("vllm", api_key=KEY)
        with caplog.at_level(logging.DEBUG):
            async with verifier_of(server, api_key=KEY) as verifier:
                assert (await verifier.generate(COPY, max_tokens=5)).token_ids
            async with verifier_of(server, api_key="sk-wrong") as verifier:
                with pytest.raises(TrustError, match="Unauthorized"):
                    await verifier.generate(COPY)
        assert caplog.records
        assert not [record for record in caplog.records if KEY in record.getMessage()]
        assert KEY not in repr(LinkOptions(api_key=KEY))

    async def test_a_key_goes_over_https_or_to_this_machine(self) -> None:
        for url in ("http://10.1.2.3:8000", "http://models.example/v1"):
            with pytest.raises(UsageError, match="in the clear"):
                AsyncRemoteVerifier(url, tokenizer=DEMO, api_key=KEY)
            AsyncRemoteVerifier(url, tokenizer=DEMO, api_key=KEY, allow_plain_http=True)
            AsyncRemoteVerifier(url, tokenizer=DEMO)

    async def test_certificates_are_checked(self, serve: Serve, tmp_path: Path) -> None:
        certificate, context = _self_signed(tmp_path)
        server = await serve("vllm", tls=context)
        async with verifier_of(server) as verifier:
            with pytest.raises(TrustError, match="certificate"):
                await verifier.generate(COPY)
        assert not server.bodies
        async with verifier_of(server, ca_file=certificate) as verifier:
            assert (await verifier.generate(COPY, max_tokens=5)).token_ids


def _renamed(tokenizer: Tokenizer) -> Tokenizer:
    """One whose single tokens all read alike, as with decoders that write � for parts of characters."""

    class Alike:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return "\ufffd"

    return Alike()  # type: ignore[return-value]


def _self_signed(directory: Path) -> tuple[Path, ssl.SSLContext]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    public, private = directory / "public.pem", directory / "private.pem"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context
