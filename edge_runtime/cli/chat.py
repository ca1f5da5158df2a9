"""`edge-runtime chat`: a conversation that remembers itself."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from edge_runtime.cli.answers import answer_json, note_speed, print_stream
from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import (
    add_connection_arguments,
    add_draft_argument,
    add_sampling_arguments,
    open_client,
    sampling_options,
)
from edge_runtime.cli.output import error, note, paint, result_json
from edge_runtime.errors import EdgeRuntimeError

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="instructions ahead of the conversation")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on stdout")
    add_sampling_arguments(parser)
    add_draft_argument(parser)
    add_connection_arguments(parser)
    parser.epilog = f"Lines of stdin are the user's turns. {_HELP}."


def _run(arguments: Namespace) -> int:
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    history = list(opening)
    interactive = sys.stdin.isatty()
    with open_client(arguments) as client:
        if interactive:
            note(f"{client.model()} at {client.url}; {_HELP}")
        for line in _turns(interactive):
            if line == "/reset":
                history = list(opening)
                note("forgotten")
                continue
            history.append({"role": "user", "content": line})
            stream = client.stream_chat(history, **sampling_options(arguments))
            try:
                answer = print_stream(stream, quiet=arguments.json)
            except KeyboardInterrupt:
                note("\nstopped")
                answer = stream.result  # what was said so far stays said
            except EdgeRuntimeError as problem:
                if not interactive:
                    raise
                error(problem.message, problem.hint)
                history.pop()
                continue
            history.append({"role": "assistant", "content": answer.text})
            if arguments.json:
                result_json(answer_json(answer))
            elif interactive:
                note_speed(answer)
    return 0


def _turns(interactive: bool) -> Iterator[str]:
    """Lines that are not empty, until the end or /exit."""
    while True:
        if interactive:
            note(paint("> ", "bold", sys.stderr), end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            note()
            return
        text = line.strip()
        if not line or text in ("/exit", "/quit"):
            return
        if text:
            yield text


COMMAND = Command("chat", "talk with the model", _configure, _run)
