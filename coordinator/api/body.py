"""A request body, read under a deadline and a size, and parsed as strict JSON.

Knows: bytes and JSON. Does not know: what the fields mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator

from aiohttp import web

from coordinator.api.errors import ApiError

MAX_BODY_BYTES = 1 << 20
READ_SECONDS = 30.0


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return fields


def parse_object(data: bytes) -> dict[str, object]:
    """One JSON object: no NaN, no infinities, no key twice, no half of a surrogate pair."""
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
        if "\\u" in text:  # only an escape can smuggle in half a pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ApiError("The request body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, UnicodeError and ours
        raise ApiError(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_json")
    return value


async def read_object(request: web.Request) -> dict[str, object]:
    """The body of a POST as one JSON object."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError("Compressed request bodies are not accepted.", code="unsupported_media_type")
    if request.content_type != "application/json":
        raise ApiError(
            "The request body must be JSON.",
            code="unsupported_media_type",
            hint="send the header `Content-Type: application/json`",
        )
    async with arriving(READ_SECONDS, "The request body did not arrive"):
        data = await request.read()
    return parse_object(data)


@contextlib.asynccontextmanager
async def arriving(seconds: float, otherwise: str) -> AsyncIterator[None]:
    """What a client sends must be here in time; else an ApiError that begins with `otherwise`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ApiError(f"{otherwise} within {seconds:g} seconds.", code="request_timeout") from None
