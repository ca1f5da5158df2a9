"""Errors as the coordinator's API writes them, for those that happen on this device.

Knows: the error object, statuses of a few codes. Does not know: who raises them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from edge_runtime.errors import EdgeRuntimeError, TransportError

RETRY_AFTER_SECONDS = "2"
_UNAVAILABLE = 503


def error_body(code: str, message: str, kind: str, hint: str = "") -> dict[str, Any]:
    fields = {"message": message, "type": kind, "param": None, "code": code}
    return {"error": fields | ({"hint": hint} if hint else {})}


def body_of(problem: EdgeRuntimeError) -> dict[str, Any]:
    return error_body(problem.code, problem.message, "server_error", problem.hint)


def response_of(problem: EdgeRuntimeError) -> web.Response:
    """503 where another try may help, else 500."""
    return told(_UNAVAILABLE if isinstance(problem, TransportError) else 500, body_of(problem))


def told(status: int, body: Mapping[str, Any]) -> web.Response:
    """An error object with the headers that its status has."""
    response = web.json_response(dict(body), status=status)
    if status in (429, _UNAVAILABLE):
        response.headers["Retry-After"] = "1" if status == 429 else RETRY_AFTER_SECONDS
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def refused(status: int, code: str, message: str, hint: str = "") -> web.Response:
    kind = "permission_error" if status == 403 else "invalid_request_error"
    return told(status, error_body(code, message, kind, hint))
