"""`edge-runtime generate PROMPT`: continue a text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from edge_runtime.cli.answers import answer_json, note_source, note_speed, print_stream
from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import (
    add_connection_arguments,
    add_draft_argument,
    add_offline_argument,
    add_sampling_arguments,
    open_client,
    sampling_options,
)
from edge_runtime.cli.output import result_json
from edge_runtime.cli.upgrades import offer_upgrade
from edge_runtime.cli.verifier import (
    add_verifier_arguments,
    note_promises,
    note_usage,
    open_verifier,
    verify_options,
)


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, when all is there")
    add_sampling_arguments(parser)
    add_draft_argument(parser)
    add_offline_argument(parser)
    add_connection_arguments(parser)
    add_verifier_arguments(parser)
    parser.set_defaults(draft=None)  # none at a coordinator, auto at another server


def _run(arguments: Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if arguments.verifier is not None:
        return _run_verifier(arguments, prompt)
    with open_client(arguments) as client:
        stream = client.stream(prompt, **sampling_options(arguments))
        answer = print_stream(stream, quiet=arguments.json)
        if arguments.json:
            result_json(answer_json(answer))
            note_source(answer)
        else:
            note_speed(answer)
            offer_upgrade(client, answer)
    return 0


def _run_verifier(arguments: Namespace, prompt: str) -> int:
    with open_verifier(arguments) as verifier:
        stream = verifier.stream(prompt, **verify_options(arguments))
        if not arguments.json:
            note_promises(verifier)
        answer = print_stream(stream, quiet=arguments.json)
    if arguments.json:
        result_json({**answer_json(answer), "usage": asdict(stream.usage)})
    else:
        note_speed(answer)
        note_usage(stream.usage, len(answer.token_ids))
    return 0


COMMAND = Command("generate", "continue a text", _configure, _run)
