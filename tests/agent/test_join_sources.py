"""Where a join link comes from: a flag, stdin, a file or the environment; never two at once."""

from __future__ import annotations

import io
from argparse import ArgumentParser
from pathlib import Path

import pytest

from edge_runtime.agent.config import AgentConfig
from edge_runtime.cli.agent import COMMAND, _join_link
from edge_runtime.config import load
from edge_runtime.errors import ConfigError, UsageError

LINK = "edge://127.0.0.1:1/?enroll=2&key=k&token=t"


def parsed(*arguments: str):
    parser = ArgumentParser()
    COMMAND.configure(parser)
    return parser.parse_args(arguments)


def test_a_join_link_comes_from_a_flag_stdin_or_a_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "link"
    file.write_text(f"{LINK}\nsomething else\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LINK}\n"))
    assert _join_link(parsed("--join", LINK)) == LINK
    assert _join_link(parsed("--join", "-")) == LINK
    assert _join_link(parsed("--join-file", str(file))) == LINK
    assert _join_link(parsed()) is None
    settings = load(environ={"EDGE_RUNTIME_AGENT_JOIN": LINK})
    assert settings.agent.join == LINK
    assert next(each for each in settings.settings() if each.name == "agent.join").secret


def test_no_link_and_two_links_are_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for arguments, why in (
        (("--join-file", str(empty)), "holds no join link"),
        (("--join-file", str(tmp_path / "none")), "can be read"),
        (("--join", LINK, "--join-file", str(empty)), "twice"),
    ):
        with pytest.raises(UsageError, match=why):
            _join_link(parsed(*arguments))


def test_a_name_with_a_comma_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no comma"):
        AgentConfig("a,b", tmp_path, 1 << 30, 1)
