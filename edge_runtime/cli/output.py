"""Where a command's words go: results to stdout, everything else to stderr.

Knows: the two streams, JSON lines, and when colour is welcome. Does not know: commands.
"""

from __future__ import annotations

import json
import sys
from typing import TextIO

from edge_runtime.config import colour_wanted


def result(text: str, *, end: str = "\n") -> None:
    """Something the caller asked for."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def result_json(value: object) -> None:
    """The same as one line of JSON."""
    result(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def note(text: str = "", *, end: str = "\n") -> None:
    """Something about the run: progress, warnings, addresses."""
    sys.stderr.write(text + end)
    sys.stderr.flush()


def error(message: str, hint: str = "") -> None:
    note(f"{paint('error:', 'red', sys.stderr)} {message}")
    if hint:
        note(f"{paint('hint:', 'cyan', sys.stderr)} {hint}")


_CODES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in a colour where the stream is a terminal and nobody said NO_COLOR."""
    if not (stream.isatty() and colour_wanted()):
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"
