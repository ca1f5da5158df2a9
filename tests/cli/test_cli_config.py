"""Settings in layers, each with its source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from edge_runtime.config import child_environment, load, parse_duration, parse_size
from edge_runtime.errors import ConfigError

FILE = """
[client]
url = "http://file:1"
timeout_seconds = "2min"
[agent]
memory_bytes = "1GiB"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults(file: Path) -> None:
    environ = {"EDGE_RUNTIME_CLIENT_URL": "http://env:2", "EDGE_RUNTIME_AGENT_THREADS": "3"}
    loaded = load({"client.url": "http://flag:3", "agent.name": None}, environ=environ, file=file)
    assert loaded.client.url == "http://flag:3"
    assert loaded.client.timeout_seconds == 120.0
    assert loaded.agent.memory_bytes == 1 << 30
    assert loaded.agent.threads == 3
    assert loaded.sources["client.url"] == "--url"
    assert loaded.sources["client.timeout_seconds"] == str(file)
    assert loaded.sources["agent.threads"] == "EDGE_RUNTIME_AGENT_THREADS"
    assert loaded.sources["agent.name"] == "default"
    assert load(environ=environ, file=file).client.url == "http://env:2"


def test_the_usual_file_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "edge-runtime"
    directory.mkdir()
    (directory / "config.toml").write_text('[agent]\nname = "phone"\n')
    assert load(environ={"XDG_CONFIG_HOME": str(tmp_path)}).agent.name == "phone"
    named = {"EDGE_RUNTIME_CONFIG": str(directory / "config.toml")}
    assert load(environ=named).agent.name == "phone"
    with pytest.raises(ConfigError, match="there is no file"):
        load(environ={"EDGE_RUNTIME_CONFIG": str(tmp_path / "no.toml")})


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[client]\nurll = 1", "no setting 'client.urll'", "did you mean 'client.url'?"),
        ("port = 1", "'port' stands outside a section", "[coordinator]"),
        ('[coordinator]\nport = "x"', "coordinator.port: 'x' is not a whole number", "config show"),
        ("[coordinator]\nport = 70000", "is not a port", "config show"),
        ('[general]\nlog_level = "loud"', "is none of debug, info", "config show"),
        ("[agent]\nmemory_bytes = true", "is not a size", "config show"),
        ("[agent\n", "config.toml", "TOML"),
    ],
)
def test_mistakes_are_named_with_a_hint(file: Path, text: str, message: str, hint: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(environ={}, file=file)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_an_unknown_variable_of_ours_is_an_error_not_a_shrug() -> None:
    with pytest.raises(ConfigError, match="EDGE_RUNTIME_CLIENT_ULR") as caught:
        load(environ={"EDGE_RUNTIME_CLIENT_ULR": "x"})
    assert caught.value.hint == "did you mean EDGE_RUNTIME_CLIENT_URL?"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("2g", 2 * 10**9), ("7", 7), (9, 9), ("1 KiB", 1024)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1XB", "1 2", True, -1, 1.5j])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300ms", 0.3), ("2s", 2.0), ("10min", 600.0), ("1h", 3600.0), (1.5, 1.5), ("4", 4.0)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


def test_what_is_no_duration() -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration("soon")


def test_children_get_our_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    environment = child_environment({"NEW": "2"})
    assert (environment["KEPT"], environment["NEW"]) == ("1", "2")


def test_config_show_hides_secrets_and_names_sources(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CLIENT_API_KEY", "sk-secret")
    assert main(["config", "show", "--json", "--file", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "sk-secret" not in printed
    shown = json.loads(printed)
    assert shown["client.api_key"]["source"] == "EDGE_RUNTIME_CLIENT_API_KEY"
    assert shown["agent.memory_bytes"] == {
        "value": 1 << 30,
        "source": str(file),
        "help": shown["agent.memory_bytes"]["help"],
    }
    assert main(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("client.api_key") and line.endswith("EDGE_RUNTIME_CLIENT_API_KEY") for line in lines
    )


def test_only_the_configuration_reads_the_environment() -> None:
    root = Path(__file__).parents[2]
    readers = [
        path.relative_to(root).as_posix()
        for package in ("edge_runtime", "coordinator", "exporters")
        for path in (root / package).rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    # _telemetry.py writes one variable, for a library that reads it
    assert sorted(readers) == ["edge_runtime/_telemetry.py", "edge_runtime/config.py"]
