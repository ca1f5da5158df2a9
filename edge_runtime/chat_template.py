"""A bundle's chat template, rendered in a sandbox.

A template is a program that came with a checkpoint. It can read what it is given and make a string: nothing else, not
for long, and not without end.

Knows: Jinja, and the few names that chat templates expect. Does not know: tokenizers, requests.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_runtime.errors import BundleError, UsageError

MAX_OUTPUT_CHARS = 4 << 20
MAX_SECONDS = 2.0
MAX_REPEAT_CHARS = 1 << 20  # of one `text * count`, of one padding

_PADDING = ("center", "indent", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")


class _Refused(jinja2.TemplateError):
    """Said by the template itself, by `raise_exception`."""


class _TooMuch(Exception):
    """A limit of ours."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1 << 20 or abs(right) > 64):
            raise _TooMuch("a power that is too large")
        if operator == "%" and isinstance(left, str | bytes):
            raise _TooMuch("formatting with %")
        if operator == "*":
            for sized, count in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and len(sized) * int(count) > MAX_REPEAT_CHARS:
                    raise _TooMuch("a repetition that is too long")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)


class ChatTemplate:
    """Compiled once. `special_tokens` are passed under their names ("bos_token", ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(str(form)[:100])
        environment.filters["tojson"] = _to_json
        for name in ("center", "indent", "format", "xmlattr", "urlize", "wordwrap"):
            environment.filters.pop(name, None)
        environment.filters["indent"] = _indent
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"the bundle's chat template can't be read: {error}", hint="export the model again"
            ) from None

    def render(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True) -> str:
        """Raises UsageError where the template refuses the messages, BundleError where it misbehaves."""
        pieces: list[str] = []
        size_chars = 0
        try:
            with _deadline(time.monotonic, MAX_SECONDS):
                for piece in self._template.generate(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                ):
                    size_chars += len(piece)
                    if size_chars > MAX_OUTPUT_CHARS:
                        raise _TooMuch(f"more than {MAX_OUTPUT_CHARS} characters")
                    pieces.append(piece)
        except _Refused as refusal:
            raise UsageError(f"this model's chat template refuses these messages: {refusal}") from None
        except _TooMuch as excess:
            raise BundleError(f"the bundle's chat template was stopped: {excess}") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise UsageError(
                f"this model's chat template can't render these messages: {error}",
                hint="each message needs a role and a content",
            ) from None
        return "".join(pieces)


def _raise_exception(message: object) -> None:
    raise _Refused(str(message)[:500])


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Without the HTML escapes of Jinja's own: models were trained on plain JSON."""
    return json.dumps(value, indent=None if indent is None else min(indent, 8), ensure_ascii=ensure_ascii)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    pad = " " * min(int(width), 64)
    lines = str(text).split("\n")
    return "\n".join(
        pad + line if (number > 0 or first) and (line or blank) else line for number, line in enumerate(lines)
    )


@contextmanager
def _deadline(clock: Callable[[], float], seconds: float) -> Iterator[None]:
    """Stops the Python code run inside at the deadline, even in a loop that gives nothing out.

    A template compiles to Python, so the interpreter's line hook sees every step of it.
    """
    end = clock() + seconds

    def hook(frame: FrameType, event: str, argument: object) -> Any:
        if clock() > end:
            raise _TooMuch(f"it ran for more than {seconds:g} s")
        return hook

    before = sys.gettrace()
    sys.settrace(hook)
    try:
        yield
    finally:
        sys.settrace(before)
