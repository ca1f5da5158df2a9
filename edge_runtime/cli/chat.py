"""`edge-runtime chat`: a conversation that remembers itself."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_runtime.cli.answers import DRAFT, answer_json, note_source, note_speed, print_stream
from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import (
    add_connection_arguments,
    add_draft_argument,
    add_offline_argument,
    add_sampling_arguments,
    open_client,
    sampling_options,
)
from edge_runtime.cli.output import error, note, paint, result, result_json
from edge_runtime.cli.upgrades import note_upgrade
from edge_runtime.errors import EdgeRuntimeError, TransportError

if TYPE_CHECKING:
    from edge_runtime.sdk.client import Client
    from edge_runtime.sdk.results import Result

_HELP = (
    "/reset forgets the conversation, /upgrade asks the target what the draft model answered last, /exit or Ctrl-D"
    " ends it, Ctrl-C stops an answer"
)


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="instructions ahead of the conversation")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on stdout")
    add_sampling_arguments(parser)
    add_draft_argument(parser)
    add_offline_argument(parser)
    add_connection_arguments(parser)
    parser.epilog = f"Lines of stdin are the user's turns. {_HELP}."


def _run(arguments: Namespace) -> int:
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    interactive = sys.stdin.isatty()
    with open_client(arguments) as client:
        if interactive:
            note(f"{_served(client)} at {client.url}; {_HELP}")
        conversation = _Conversation(client, arguments, opening, interactive)
        for line in _turns(interactive):
            conversation.turn(line)
    return 0


def _served(client: Client) -> str:
    try:
        return client.model()
    except TransportError:  # a turn says more, or is answered by the draft model
        return "nobody yet"


class _Conversation:
    """`offline`: the last answer of the draft model's, and where it stands in the history."""

    def __init__(
        self, client: Client, arguments: Namespace, opening: list[dict[str, str]], interactive: bool
    ) -> None:
        self._client = client
        self._arguments = arguments
        self._opening = opening
        self._interactive = interactive
        self._history = list(opening)
        self._offline: tuple[int, Result] | None = None

    def turn(self, line: str) -> None:
        """Raises EdgeRuntimeError where nobody is there to read it."""
        try:
            if line == "/reset":
                self._history, self._offline = list(self._opening), None
                note("forgotten")
            elif line == "/upgrade":
                self._upgrade()
            else:
                self._ask(line)
        except EdgeRuntimeError as problem:
            if not self._interactive:
                raise
            error(problem.message, problem.hint)

    def _ask(self, text: str) -> None:
        messages = [*self._history, {"role": "user", "content": text}]
        stream = self._client.stream_chat(messages, **sampling_options(self._arguments))
        try:
            answer = print_stream(stream, quiet=self._arguments.json)
        except KeyboardInterrupt:
            note("\nstopped")
            answer = stream.result  # what was said so far stays said
        self._history = [*messages, {"role": "assistant", "content": answer.text}]
        self._show(answer)
        if answer.answered_by == DRAFT:
            self._offline = len(messages), answer
        elif self._offline is not None:
            note("the target is back: /upgrade asks it what the draft model answered before")

    def _upgrade(self) -> None:
        """The target's answer takes the draft's place; what was said after it stays."""
        if self._offline is None:
            note("there is no answer of the draft model to upgrade")
            return
        place, draft = self._offline
        upgrade = self._client.upgrade(draft)
        self._history[place] = {"role": "assistant", "content": upgrade.result.text}
        self._offline = None
        if not self._arguments.json:
            result(upgrade.result.text)
        self._show(upgrade.result)
        note_upgrade(upgrade, draft)

    def _show(self, answer: Result) -> None:
        if self._arguments.json:
            result_json(answer_json(answer))
        elif self._interactive:
            note_speed(answer)
            return
        note_source(answer)


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
