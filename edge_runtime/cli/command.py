"""What a command of `edge-runtime` is.

A module with a command ends with `COMMAND = Command(...)`. Its top imports stay light: every command is imported
to list them, so numpy, onnxruntime and the like are imported inside `run`.

Knows: the four things a command is made of. Does not know: which commands there are.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """`configure` adds arguments to the command's own parser; `run` returns the exit code.

    `run` raises EdgeRuntimeError for what a person can mend: the CLI prints it with its hint and picks the exit code.
    """

    name: str
    help: str  # one line, lower case, no full stop
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
