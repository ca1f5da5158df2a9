"""The command line's frame: finding commands, errors with hints, exit codes, streams, progress."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pytest

from edge_runtime import errors
from edge_runtime.cli import main as cli
from edge_runtime.cli.command import Command
from edge_runtime.cli.output import paint
from edge_runtime.cli.progress import Progress, format_amount, format_seconds


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes every command raise this."""

    def set_error(problem: BaseException) -> None:
        def run(arguments: Namespace) -> int:
            raise problem

        command = Command("demo", "raise", lambda parser: None, run)
        monkeypatch.setattr(cli, "_find", lambda name: command)

    return set_error


def test_every_error_of_ours_ends_with_a_hint_and_a_grouped_exit_code(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, code in cli.EXIT_CODES.items():
        raising(kind("it broke", hint="mend it"))
        assert cli.main(["demo"]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == "error: it broke\nhint: mend it\n"
    assert cli.EXIT_CODES[errors.TamperedError] != cli.EXIT_CODES[errors.BundleError]


def test_an_error_without_a_hint_gets_one(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(errors.TransportError("gone"))
    cli.main(["demo"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: ")


def test_a_missing_extra_is_named(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ModuleNotFoundError("No module named 'jinja2'", name="jinja2.sandbox"))
    assert cli.main(["demo"]) == 1
    assert "pip install 'edge-runtime[coordinator]'" in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_sentence_without_a_trace_unless_asked(
    raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ZeroDivisionError("division by zero"))
    assert cli.main(["demo"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: internal error: ZeroDivisionError: division by zero\nhint: ")
    assert "Traceback" not in printed
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "demo"])


def test_ctrl_c_has_its_own_code(raising: Callable[[BaseException], None]) -> None:
    raising(KeyboardInterrupt())
    assert cli.main(["demo"]) == 130


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generat"]) == 2
    assert (
        capsys.readouterr().err
        == "error: there is no command 'generat'\nhint: did you mean `edge-runtime generate`?\n"
    )


def test_wrong_arguments_end_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "hint: edge-runtime generate --help lists the arguments"
    )


def test_help_lists_every_command_of_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in (
        "demo",
        "export",
        "coordinator",
        "agent",
        "generate",
        "chat",
        "embed",
        "plan",
        "devices",
        "doctor",
    ):
        assert f"\n  {name} " in overview
    assert cli.main([]) == 2


def test_every_command_explains_itself() -> None:
    for name in cli.command_names():
        command = cli._find(name)
        assert command is not None
        assert command.name == name
        assert command.help[0].islower()
        assert not command.help.endswith(".")
        parser = ArgumentParser()
        command.configure(parser)
        assert parser.format_help()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-runtime {cli.version()}\n"


def test_the_frame_imports_nothing_heavy() -> None:
    program = "import sys, edge_runtime.cli.main, edge_runtime.cli.demo; print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(printed.split())
    assert not loaded & {"numpy", "onnxruntime", "zmq", "aiohttp", "asyncio", "tokenizers", "coordinator"}


def test_importing_the_frame_is_fast() -> None:
    """Every `--help` waits for it. Counted in modules, since seconds depend on what else this machine does."""
    program = (
        "import sys; before = {*sys.modules}; import edge_runtime.cli.main; print(*{*sys.modules} - before)"
    )
    command = [sys.executable, "-I", "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "edge_runtime.cli.main" in loaded
    assert len(loaded) < 80


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert b"Traceback" not in done.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestOutput:
    def test_colour_only_on_terminals_that_want_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert paint("x", "red", _Terminal()) == "\x1b[31mx\x1b[0m"
        assert paint("x", "red", io.StringIO()) == "x"
        monkeypatch.setenv("NO_COLOR", "1")
        assert paint("x", "red", _Terminal()) == "x"


class TestProgress:
    def test_it_never_goes_backwards(self) -> None:
        stream = io.StringIO()
        with Progress("fetching", total=100, unit="B", stream=stream) as bar:
            for done in (10, 60, 30, 55, 100):
                bar.update(done)
        percents = [int(line.split("%")[0].split()[-1]) for line in stream.getvalue().splitlines()]
        assert percents == sorted(percents)
        assert percents[-1] == 100
        assert bar.done == 100

    def test_without_a_terminal_it_says_a_line_per_tenth(self) -> None:
        stream = io.StringIO()
        bar = Progress("x", total=1000, stream=stream)
        for done in range(1001):
            bar.update(done)
        assert len(stream.getvalue().splitlines()) == 11

    def test_on_a_terminal_it_redraws_one_line_and_guesses_the_time_left(self) -> None:
        now = [0.0]
        stream = _Terminal()
        with Progress("fetching", total=2 << 20, unit="B", stream=stream, clock=lambda: now[0]) as bar:
            now[0] = 30.0
            bar.update(1 << 20)
            assert (
                "[============            ] fetching  50% 1.0 MiB of 2.0 MiB, 30 s left" in stream.getvalue()
            )
            bar.update(2 << 20)
        assert stream.getvalue().count("\n") == 1

    def test_an_unknown_total_counts_up(self) -> None:
        stream = io.StringIO()
        Progress("probing", unit="rows", stream=stream).update(3)
        assert stream.getvalue() == "probing 3 rows\n"

    @pytest.mark.parametrize(("amount", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")])
    def test_amounts(self, amount: int, text: str) -> None:
        assert format_amount(amount, "B") == text

    def test_seconds(self) -> None:
        assert [format_seconds(s) for s in (3.4, 61, 3600)] == ["3 s", "1 min 01 s", "60 min 00 s"]
