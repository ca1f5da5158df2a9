"""`edge-runtime embed TEXT …`: vectors of texts."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace

from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import add_connection_arguments, open_client
from edge_runtime.cli.output import note, result, result_json
from edge_runtime.errors import UsageError

_SHOWN_VALUES = 6


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help="texts; a single - reads one per line of stdin"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, with all values")
    add_connection_arguments(parser)


def _run(arguments: Namespace) -> int:
    texts = arguments.texts
    if texts == ["-"]:
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UsageError("there is no text to embed", hint="give texts, or - and lines on stdin")
    with open_client(arguments) as client:
        vectors = client.embed(texts)
        model = client.model()
    if arguments.json:
        result_json({"model": model, "embeddings": [vector.tolist() for vector in vectors]})
        return 0
    for text, vector in zip(texts, vectors, strict=True):
        values = ", ".join(f"{value:+.4f}" for value in vector[:_SHOWN_VALUES])
        result(f"{json.dumps(text, ensure_ascii=False)}: [{values}, …] {len(vector)} values")
    note("--json prints all values")
    return 0


COMMAND = Command("embed", "turn texts into vectors", _configure, _run)
