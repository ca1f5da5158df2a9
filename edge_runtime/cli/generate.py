"""`edge-runtime generate PROMPT`: continue a text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from edge_runtime.cli.answers import answer_json, note_speed, print_stream
from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import (
    add_connection_arguments,
    add_draft_argument,
    add_sampling_arguments,
    open_client,
    sampling_options,
)
from edge_runtime.cli.output import result_json


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, when all is there")
    add_sampling_arguments(parser)
    add_draft_argument(parser)
    add_connection_arguments(parser)


def _run(arguments: Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with open_client(arguments) as client:
        stream = client.stream(prompt, **sampling_options(arguments))
        answer = print_stream(stream, quiet=arguments.json)
    if arguments.json:
        result_json(answer_json(answer))
    else:
        note_speed(answer)
    return 0


COMMAND = Command("generate", "continue a text", _configure, _run)
