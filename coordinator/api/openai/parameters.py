"""Tables of parameters and the checks behind them: what is not in a table is refused, never ignored.

Knows: names, types, ranges and defaults. Does not know: what a parameter does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.api.errors import ApiError

Check = Callable[[object], Any]
"""Turns a JSON value into ours, or raises ValueError with what it must be ("must be …")."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A supported parameter. JSON null means "not given", as the official clients use it."""

    name: str
    takes: str  # for people
    check: Check
    default: Any = None
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Harmless:
    """A parameter we do nothing with, accepted only with values that ask for nothing."""

    name: str
    accepts: str  # for people
    is_harmless: Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Table:
    parameters: Sequence[Parameter]
    harmless: Sequence[Harmless] = ()

    def read(self, body: Mapping[str, object]) -> dict[str, Any]:
        """Every supported parameter with its value or default. Raises ApiError that names the first wrong field."""
        harmless = {each.name: each for each in self.harmless}
        known = {each.name for each in self.parameters}
        for name, value in body.items():
            if name not in known:
                _refuse_unsupported(name, value, harmless.get(name))
        return {each.name: _read_one(each, body.get(each.name)) for each in self.parameters}


def _refuse_unsupported(name: str, value: object, harmless: Harmless | None) -> None:
    if harmless is None:
        raise ApiError(
            f"The parameter `{name[:64]}` is not supported.",
            code="unsupported_parameter",
            param=name[:64],
            hint="leave it out; docs/http_api.md lists what is supported",
        )
    if value is not None and not harmless.is_harmless(value):
        raise ApiError(
            f"`{name}` is not supported beyond {harmless.accepts}.", code="unsupported_parameter", param=name
        )


def _read_one(parameter: Parameter, value: object) -> Any:
    if value is None:
        if parameter.is_required:
            raise ApiError(
                f"The parameter `{parameter.name}` is required.",
                code="missing_parameter",
                param=parameter.name,
            )
        return parameter.default
    return checked(parameter.check, value, parameter.name)


def checked(check: Check, value: object, param: str) -> Any:
    """`check(value)`, its complaint as a 400 that names the field."""
    try:
        return check(value)
    except ValueError as error:
        raise ApiError(f"`{param}` {error}.", code="invalid_value", param=param) from None


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def integer(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """From `low` (not itself, where `above`) to `high`."""
    said = (
        f"must be a number above {low:g} and at most {high:g}"
        if above
        else f"must be a number from {low:g} to {high:g}"
    )

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(said)
        # Compared before converting: an integer of a thousand digits does not fit a float.
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            raise ValueError(said)
        return float(value)

    return check


def one_of(*values: object) -> Callable[[object], bool]:
    """For harmless values: equal and of the same type, so that 1 is not true."""
    return lambda given: any(type(given) is type(value) and given == value for value in values)


def is_number(expected: float) -> Callable[[object], bool]:
    return lambda given: isinstance(given, (int, float)) and not isinstance(given, bool) and given == expected


def is_label(given: object) -> bool:
    """A string or a map of strings: says who asked, and changes no output."""
    if isinstance(given, dict):
        return all(isinstance(value, str) for value in given.values())
    return isinstance(given, str)
