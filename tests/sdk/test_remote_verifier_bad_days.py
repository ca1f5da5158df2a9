"""Remote verifiers on bad days: servers that refuse, break, lie or change, and keys that must not leak."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import logging
import ssl
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
from tests.support.model_server import DEMO
from tests.support.remote_verifiers import COPY, KEY, WAYS, Serve, eager, plain, verifier_of


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
