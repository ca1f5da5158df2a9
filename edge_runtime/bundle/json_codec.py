"""Dataclasses to canonical JSON and back, strictly.

Knows: dataclasses made of str, int, float, bool, tuples, string-keyed mappings and each other. An unknown key, a
missing one or a wrong type is a BundleError that names the place. Does not know: what the values mean.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

from edge_runtime.errors import BundleError

T = TypeVar("T")


def to_canonical_json(value: object) -> bytes:
    """UTF-8, sorted keys, no spaces: the same value always gives the same bytes, so that it can be signed."""
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def from_json(cls: type[T], data: bytes, *, what: str) -> T:
    """Raises BundleError with the path of the first value that does not fit `cls`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what} is not JSON: {error}") from None
    return typing.cast(T, _build(cls, value, what))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, collections.abc.Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _build(kind: Any, value: object, path: str) -> object:
    if isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, path)
    origin = typing.get_origin(kind)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise BundleError(f"{path} must be a list")
        return tuple(_build(item_kind, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is collections.abc.Mapping:
        item_kind = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise BundleError(f"{path} must be an object")
        return {key: _build(item_kind, item, f"{path}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if type(value) in typing.get_args(kind):
            return value
        raise BundleError(f"{path} has the wrong type {type(value).__name__}")
    return _build_scalar(kind, value, path)


def _build_scalar(kind: Any, value: object, path: str) -> object:
    if kind is float and type(value) in (int, float) and math.isfinite(typing.cast(float, value)):
        return float(typing.cast(float, value))
    if type(value) is not kind:
        raise BundleError(f"{path} must be {kind.__name__}, not {type(value).__name__}")
    return value


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], _is_required(f)) for f in dataclasses.fields(kind)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _build_dataclass(kind: type, value: object, path: str) -> object:
    if not isinstance(value, dict):
        raise BundleError(f"{path} must be an object")
    fields = _fields(kind)
    if unknown := value.keys() - fields.keys():
        raise BundleError(
            f"{path} has an unknown key {sorted(unknown)[0]!r}",
            hint="update edge-runtime: the bundle was written by a newer version",
        )
    if missing := {name for name, (_, required) in fields.items() if required} - value.keys():
        raise BundleError(f"{path} lacks {sorted(missing)[0]!r}")
    return kind(**{name: _build(fields[name][0], item, f"{path}.{name}") for name, item in value.items()})
