"""`generate --verifier`, and the same from a program without an event loop, against a real server on another thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import RemoteVerifier
from edge_runtime.cli.main import main
from tests.support.model_server import DEMO, ModelServer, model_server

Capture = pytest.CaptureFixture[str]
PROMPT = "def total(values):\n    result = 0\n    for value in values:\n"
KEY = "sk-of-that-server"
SAME = ["--tokenizer", str(DEMO), "--max-tokens", "20"]


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    made: list[ModelServer] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with model_server("sglang", api_key=KEY) as server:
            made.append(server)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait()
    yield made[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return str(path)


def test_text_on_stdout_and_what_is_promised_on_stderr(
    server: ModelServer, key_file: str, capsys: Capture
) -> None:
    assert main(["generate", PROMPT, "--verifier", server.url, "--api-key-file", key_file, *SAME]) == 0
    printed = capsys.readouterr()
    with RemoteVerifier(server.url, tokenizer=DEMO, draft="none", api_key=KEY) as verifier:
        plain = verifier.generate(PROMPT, max_tokens=20)
    assert printed.out == plain.text + "\n"
    assert "sglang at" in printed.err
    assert "almost equally likely" in printed.err
    assert "prompt tokens sent per token" in printed.err
    assert KEY not in printed.err


def test_json_has_what_it_cost(server: ModelServer, key_file: str, capsys: Capture) -> None:
    flags = ["--verifier", server.url, "--api-key-file", key_file, "--json", "--draft", "suffix", *SAME]
    assert main(["generate", PROMPT, *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 20
    assert answer["usage"]["requests"] >= 1
    assert answer["model"] == "demo"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 24, "refuses the API key"),
        (["--temperature", "0.5"], 2, "can't sample"),
        (["--top-p", "0.5"], 2, "'top_p'"),
        (["--url", "http://127.0.0.1:1"], 2, "give one"),
        (["--tokenizer", "/nowhere"], 3, "no tokenizer"),
        (["--dialect", "ollama"], 2, "unknown dialect"),
        (["--offline", "draft"], 2, "--offline"),
    ],
)
def test_refusals_say_what_to_do(
    server: ModelServer, capsys: Capture, flags: list[str], code: int, said: str
) -> None:
    assert main(["generate", PROMPT, "--verifier", server.url, *SAME, *flags]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert "hint: " in printed.err


def test_the_tokenizer_must_be_named(server: ModelServer, capsys: Capture) -> None:
    assert main(["generate", PROMPT, "--verifier", server.url]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_a_coordinator_s_key_is_not_sent_elsewhere(
    server: ModelServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", KEY)  # the server's own, to see whether it is sent
    assert main(["generate", PROMPT, "--verifier", server.url, *SAME]) == 24
    assert "refuses the API key" in capsys.readouterr().err


def test_it_needs_no_event_loop(server: ModelServer) -> None:
    with RemoteVerifier(server.url, tokenizer=DEMO, api_key=KEY) as verifier:
        assert verifier.server().dialect.name == "sglang"
        stream = verifier.stream(PROMPT, max_tokens=12)
        ids = [token.id for token in stream]
        assert tuple(ids) == stream.result.token_ids
        assert len(ids) == 12
        with verifier.stream(PROMPT, max_tokens=500) as left:
            next(left)
        assert verifier.generate(PROMPT, max_tokens=12).token_ids == tuple(ids)
        assert verifier.requests > 3
