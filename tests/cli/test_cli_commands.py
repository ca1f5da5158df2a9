"""The commands that talk to a coordinator, through the real command line and the real HTTP API."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from tests.support.api_server import ADMIN_KEY, USER_KEY
from tests.support.fake_service import ENCODER, FakeService
from tests.support.threaded_api import threaded_api

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with threaded_api(service) as url:
        monkeypatch.setenv("EDGE_RUNTIME_CLIENT_URL", url)
        monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", ADMIN_KEY)
        yield url


class TestGenerate:
    def test_text_on_stdout_and_speed_on_stderr(self, url: str, capsys: Capture) -> None:
        assert main(["generate", "abc", "--max-tokens", "4", "--seed", "1"]) == 0
        printed = capsys.readouterr()
        assert printed.out == "bcde\n" or len(printed.out) == 5
        assert "tokens/s" in printed.err
        assert "seed 1" in printed.err

    def test_json_is_one_line_with_everything(self, url: str, capsys: Capture) -> None:
        flags = ["--max-tokens", "4", "--seed", "1", "--temperature", "0", "--stop", "zzz"]
        assert main(["generate", "abc", "--json", *flags]) == 0
        printed = capsys.readouterr()
        answer = json.loads(printed.out)
        assert printed.out.count("\n") == 1
        assert len(answer["token_ids"]) == 4
        assert answer["finish_reason"] == "length"
        assert answer["timings"]["tokens_per_second"] > 0

    def test_drafts_change_nothing_and_a_drafter_that_is_none_is_refused(
        self, url: str, capsys: Capture
    ) -> None:
        flags = ["--max-tokens", "4", "--seed", "1"]
        assert main(["generate", "abcdefabcdef", "--draft", "suffix", *flags]) == 0
        assert capsys.readouterr().out == "bcde\n"
        assert main(["generate", "abc", "--draft", "sufix", *flags]) == 2
        assert "no drafter" in capsys.readouterr().err

    def test_the_prompt_may_come_from_stdin(
        self, url: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
        assert main(["generate", "-", "--json", "--max-tokens", "1"]) == 0
        assert bytes(json.loads(capsys.readouterr().out)["prompt_token_ids"]) == b"from a pipe"

    def test_the_api_refuses_with_its_sentence_and_our_code(self, url: str, capsys: Capture) -> None:
        assert main(["generate", "x" * 500, "--max-tokens", "5"]) == 30
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "500" in printed.err
        assert printed.err.splitlines()[-1].startswith("hint: ")

    def test_a_key_file_beats_the_setting(self, url: str, capsys: Capture, tmp_path: Path) -> None:
        key = tmp_path / "key"
        key.write_text("sk-edge-wrong-00000000000\n")
        assert main(["generate", "x", "--api-key-file", str(key)]) == 24
        key.write_text(ADMIN_KEY + "\n")
        assert main(["generate", "x", "--max-tokens", "1", "--api-key-file", str(key)]) == 0

    def test_on_the_coordinators_machine_its_own_key_is_used(
        self, url: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("EDGE_RUNTIME_CLIENT_API_KEY")
        monkeypatch.setenv("EDGE_RUNTIME_GENERAL_STATE_DIRECTORY", str(tmp_path))
        assert main(["generate", "x", "--max-tokens", "1"]) == 24
        (tmp_path / "coordinator").mkdir()
        (tmp_path / "coordinator" / "api.key").write_text(ADMIN_KEY)
        assert main(["generate", "x", "--max-tokens", "1"]) == 0


class TestChat:
    def test_history_grows_and_can_be_forgotten(
        self, url: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
        assert main(["chat", "--json", "--max-tokens", "2", "--seed", "1", "--system", "be kind"]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        prompts = [bytes(answer["prompt_token_ids"]).decode() for answer in answers]
        assert prompts[0] == "<system>be kind<user>one<assistant>"
        assert prompts[1] == f"<system>be kind<user>one<assistant>{answers[0]['text']}<user>two<assistant>"
        assert prompts[2] == "<system>be kind<user>three<assistant>"


class TestEmbed:
    def test_vectors(
        self, url: str, service: FakeService, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.model = ENCODER
        assert main(["embed", "a", "b", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [len(vector) for vector in answer["embeddings"]] == [4, 4]
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
        assert main(["embed", "-"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert main(["embed", "-"]) == 2


class TestDevices:
    def test_a_table_with_reasons(self, url: str, capsys: Capture) -> None:
        assert main(["devices"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:3] == ["NAME", "STATE", "LAYERS"]
        assert lines[1].split()[:3] == ["phone", "serving", "0-1"]
        assert lines[3].endswith("it would slow the pipeline")

    def test_json_link_and_revoke(self, url: str, service: FakeService, capsys: Capture) -> None:
        assert main(["devices", "--json"]) == 0
        assert [device["name"] for device in json.loads(capsys.readouterr().out)] == [
            "phone",
            "laptop",
            "old-tablet",
        ]
        assert main(["devices", "link"]) == 0
        assert capsys.readouterr().out.startswith("edge://")
        assert main(["devices", "revoke", "phone"]) == 0
        assert service.revoked == ["phone"]
        assert main(["devices", "revoke"]) == 2
        assert main(["devices", "revoke", "fridge"]) == 2

    def test_a_users_key_is_not_enough(
        self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", USER_KEY)
        assert main(["devices"]) == 24


def test_nobody_there_is_said_once_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, unused_tcp_port: int
) -> None:
    assert main(["generate", "x", "--url", f"http://127.0.0.1:{unused_tcp_port}"]) == 22
    assert "edge-runtime coordinator" in capsys.readouterr().err


class TestDoctor:
    def test_every_check_has_a_reason(
        self, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGE_RUNTIME_GENERAL_STATE_DIRECTORY", str(tmp_path / "state"))
        monkeypatch.setenv("EDGE_RUNTIME_COORDINATOR_PORT", "0")
        assert main(["doctor", "--json"]) == 0
        findings = json.loads(capsys.readouterr().out)
        checks = {finding["check"]: finding for finding in findings}
        assert {"python", "native kernels", "onnxruntime", "bundle", "row invariance", "port"} <= set(checks)
        assert all(finding["reason"] for finding in findings)
        assert all(finding["hint"] for finding in findings if finding["level"] != "ok")

    def test_what_is_wrong_fails_it_with_a_hint(
        self, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGE_RUNTIME_GENERAL_STATE_DIRECTORY", str(tmp_path / "file"))
        assert main(["doctor", "--bundle", str(tmp_path)]) == 1
        lines = capsys.readouterr().out.splitlines()
        failed = [index for index, line in enumerate(lines) if line.startswith("failed")]
        assert len(failed) >= 3  # the state directory, the bundle, and the probe that needs it
        assert "hint:" in lines[failed[0] + 1]
