"""The `edge-runtime` command: finds the command asked for, runs it, and turns errors into a sentence and an exit code.

Only the module of the command asked for is imported; `--help` imports them all. Commands of the packages above
`edge_runtime` are found by the entry-point group `edge_runtime.commands`.

Exit codes: 0 done, 1 internal, 2 usage, 3 configuration, 10-19 files and bundles, 20-29 links and trust,
30-39 capacity and plans, 40-49 engines, 50-59 requests, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from edge_runtime import errors
from edge_runtime.cli.command import Command

OWN_COMMANDS = ("demo", "agent", "draft", "generate", "chat", "embed", "devices", "doctor", "config")
ENTRY_POINT_GROUP = "edge_runtime.commands"

EXIT_CODES: dict[type[errors.EdgeRuntimeError], int] = {
    errors.UsageError: 2,
    errors.ConfigError: 3,
    errors.BundleError: 10,
    errors.TamperedError: 11,
    errors.ExportError: 12,
    errors.ProtocolError: 20,
    errors.VersionError: 21,
    errors.TransportError: 22,
    errors.ConnectionClosed: 23,
    errors.TrustError: 24,
    errors.CapacityError: 30,
    errors.PlanError: 31,
    errors.EngineError: 40,
    errors.RequestFailed: 50,
}
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# which extra brings a module that a command could not import
EXTRAS = {
    "jinja2": "coordinator",
    "prometheus_client": "coordinator",
    "onnx": "export",
    "huggingface_hub": "export",
    "torch": "torch",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[:1]
    if debug:
        arguments.pop(0)
    try:
        return _dispatch(arguments)
    except errors.EdgeRuntimeError as problem:
        if debug:
            raise
        _report(problem.message, problem.hint or "edge-runtime doctor checks this machine")
        return exit_code(problem)
    except ModuleNotFoundError as problem:
        if debug or problem.name is None or problem.name.partition(".")[0] not in EXTRAS:
            raise
        extra = EXTRAS[problem.name.partition(".")[0]]
        _report(f"this command needs {problem.name}", f"pip install 'edge-runtime[{extra}]'")
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; the interpreter's own complaint about stdout would help nobody
        return EXIT_BROKEN_PIPE
    except Exception as problem:
        if debug:
            raise
        _report(
            f"internal error: {type(problem).__name__}: {problem}",
            "run `edge-runtime --debug …` again and report the trace",
        )
        return 1


def exit_code(problem: errors.EdgeRuntimeError) -> int:
    """The code of the nearest class in the table."""
    for kind in type(problem).__mro__:
        if kind in EXIT_CODES:
            return EXIT_CODES[kind]
    return 1


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name == "--version":
        from edge_runtime.cli.output import result

        result(f"edge-runtime {version()}")
        return 0
    command = _find(name) if name and not name.startswith("-") else None
    if command is None:
        return _top_level(name, arguments)
    parser = argparse.ArgumentParser(
        prog=f"edge-runtime {command.name}",
        description=command.help[:1].upper() + command.help[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(parser)
    return command.run(_parse(parser, arguments[1:]))


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """argparse's own errors, ending with our hint line."""
    try:
        return parser.parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            from edge_runtime.cli.output import note

            note(f"hint: {parser.prog} --help lists the arguments")
        raise


def _top_level(name: str, arguments: list[str]) -> int:
    if name in ("", "-h", "--help", "help"):
        from edge_runtime.cli.output import note, result

        (result if name else note)(_overview())
        return 0 if name else 2
    import difflib

    near = difflib.get_close_matches(name, command_names(), n=1)
    hint = f"did you mean `edge-runtime {near[0]}`?" if near else "edge-runtime --help lists the commands"
    raise errors.UsageError(f"there is no command {name!r}", hint=hint)


def _overview() -> str:
    lines = [
        "usage: edge-runtime [--version] [--debug] COMMAND …",
        "",
        "One model over all your devices.",
        "",
    ]
    commands = [command for command in map(_find, command_names()) if command is not None]
    width = max((len(command.name) for command in commands), default=0)
    lines += [f"  {command.name:<{width}}  {command.help}" for command in commands]
    return "\n".join(
        [*lines, "", "edge-runtime COMMAND --help says more. EDGE_RUNTIME_… settings: config show."]
    )


def command_names() -> list[str]:
    return [*OWN_COMMANDS, *(entry for entry in _entry_points() if entry not in OWN_COMMANDS)]


def _find(name: str) -> Command | None:
    if name in OWN_COMMANDS:
        return _checked(importlib.import_module(f"edge_runtime.cli.{name}").COMMAND)
    reference = _entry_points().get(name)
    if reference is None:
        return None
    module, _, attribute = reference.partition(":")
    return _checked(getattr(importlib.import_module(module), attribute))


def _checked(command: object) -> Command:
    if not isinstance(command, Command):
        raise TypeError(f"{command!r} is not a Command")
    return command


def _entry_points() -> dict[str, str]:
    """Name -> "module:attribute" of commands that other installed packages bring."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in sorted(entry_points(group=ENTRY_POINT_GROUP))}


def version() -> str:
    from importlib.metadata import version as installed_version

    return installed_version("edge-runtime")


def _report(message: str, hint: str) -> None:
    from edge_runtime.cli.output import error

    error(message, hint)
