"""`--offline draft` on the real command line: what is printed, and the offer when the coordinator is back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from edge_runtime.cli.upgrades import difference, wait_until_ready
from edge_runtime.errors import TransportError
from tests.support.api_server import ADMIN_KEY
from tests.support.fake_service import TOKENIZER_JSON, FakeService
from tests.support.threaded_api import threaded_api
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def nobody(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", ADMIN_KEY)
    return f"http://127.0.0.1:{unused_tcp_port}"


class LateApi:
    """An address, and the API that is there once it is started."""

    def __init__(self, port: int, stack: contextlib.ExitStack) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._stack = stack
        self._is_started = False

    def start(self) -> None:
        if not self._is_started:
            self._stack.enter_context(threaded_api(FakeService(), self._port))
            self._is_started = True


@pytest.fixture
def late_api(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateApi]:
    monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", ADMIN_KEY)
    with contextlib.ExitStack() as stack:
        yield LateApi(unused_tcp_port, stack)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the fake service's tokenizer."""
    path = tmp_path_factory.mktemp("draft") / "bundle"
    model = TinyModel(layers=2, vocab=256, max_context=128)
    build_tiny_bundle(path, model, TOKENIZER_JSON, "{{ messages[0].content }}").close()
    return path


def flags(url: str, draft: Path) -> list[str]:
    return ["--url", url, "--draft", str(draft), "--offline", "draft", "--max-tokens", "6", "--seed", "3"]


def test_generate_says_on_stderr_who_answered(nobody: str, draft: Path, capsys: Capture) -> None:
    assert main(["generate", "def f(", *flags(nobody, draft)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out) > 1
    assert "answered_by: draft: this device's draft model, tiny; nothing answers at" in printed.err
    assert "--seed 3 asks the target" in printed.err
    assert main(["generate", "def f(", "--json", *flags(nobody, draft)]) == 0
    printed_json = capsys.readouterr()
    answer = json.loads(printed_json.out)
    assert (answer["answered_by"], answer["target_tokens"], answer["text"] + "\n") == (
        "draft",
        0,
        printed.out,
    )
    assert "answered_by: draft" in printed_json.err
    assert main(["generate", "def f(", "--url", nobody]) == 22
    assert main(["generate", "def f(", "--url", nobody, "--offline", "always"]) == 2


def test_a_conversation_is_upgraded_in_its_place(
    late_api: LateApi, draft: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator is there from the second line on; the third line's turn sees the upgraded answer."""

    class Typing(io.StringIO):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            line = super().readline()
            if line == "/upgrade\n":
                late_api.start()
            return line

    monkeypatch.setattr("sys.stdin", Typing("one\n/upgrade\ntwo\n/upgrade\n"))
    assert main(["chat", "--json", *flags(late_api.url, draft)]) == 0
    printed = capsys.readouterr()
    first, upgraded, second = (json.loads(line) for line in printed.out.splitlines())
    assert [each["answered_by"] for each in (first, upgraded, second)] == ["draft", "target", "target"]
    assert (upgraded["seed"], upgraded["text"]) == (3, "defghi")
    assert bytes(second["prompt_token_ids"]).decode() == "<user>one<assistant>defghi<user>two<assistant>"
    assert "something else from token 0 of 6" in printed.err
    assert "there is no answer of the draft model" in printed.err


def test_generate_on_a_terminal_offers_the_upgrade_when_the_coordinator_is_back(
    late_api: LateApi, draft: Path
) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "generate",
        "abc",
        *flags(late_api.url, draft),
    ]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"NO_COLOR": "1"},
    )
    try:
        said = _read_until(process, b"Ctrl-C ends")
        assert b"answered_by: draft" in said
        late_api.start()
        _read_until(process, b"[Y/n]")
        os.write(ours, b"\n")
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0, err
    assert out.decode().splitlines()[-1] == "defghi"
    assert b"something else from token" in err


def _read_until(process: subprocess.Popen[bytes], mark: bytes, seconds: float = 40.0) -> bytes:
    """What it says on stderr, up to a mark."""
    assert process.stderr is not None
    found, end = b"", time.monotonic() + seconds
    while mark not in found:
        readable, _, _ = select.select([process.stderr], [], [], max(0.0, end - time.monotonic()))
        assert readable, found
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, found
        found += piece
    return found


def test_waiting_asks_less_and_less_often() -> None:
    class Back:
        asked = 0

        def ready(self) -> None:
            self.asked += 1
            if self.asked < 6:
                raise TransportError("nobody")

    pauses: list[float] = []
    wait_until_ready(Back(), pauses.append)  # type: ignore[arg-type]
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_difference_in_words() -> None:
    assert difference(None, 6) == "the target says the same: all 6 tokens"
    assert "from token 4 of 6" in difference(4, 6)
