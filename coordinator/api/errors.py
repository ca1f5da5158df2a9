"""One table: what a code of ours is in HTTP and in OpenAI's error object.

Knows: codes, statuses, the shape of an error body. Does not know: who raises them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler

from edge_runtime.errors import EdgeRuntimeError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    status: int
    type: str
    retry_after_seconds: int = 0


_INVALID = "invalid_request_error"
_PERMISSION = "permission_error"
_LIMIT = "rate_limit_error"
_SERVER = "server_error"

KINDS: Mapping[str, Kind] = {
    # the caller's request
    "invalid_json": Kind(400, _INVALID),
    "invalid_value": Kind(400, _INVALID),
    "missing_parameter": Kind(400, _INVALID),
    "unsupported_parameter": Kind(400, _INVALID),
    "context_length_exceeded": Kind(400, _INVALID),
    "model_cannot": Kind(400, _INVALID),
    "usage": Kind(400, _INVALID),
    "capacity": Kind(400, _INVALID),
    "bad_request": Kind(400, _INVALID),
    "invalid_api_key": Kind(401, _INVALID),
    "not_permitted": Kind(403, _PERMISSION),
    "host_not_allowed": Kind(403, _PERMISSION),
    "origin_not_allowed": Kind(403, _PERMISSION),
    "not_found": Kind(404, _INVALID),
    "model_not_found": Kind(404, _INVALID),
    "request_not_found": Kind(404, _INVALID),
    "device_not_found": Kind(404, _INVALID),
    "method_not_allowed": Kind(405, _INVALID),
    "request_timeout": Kind(408, _INVALID),
    "request_too_large": Kind(413, _INVALID),
    "unsupported_media_type": Kind(415, _INVALID),
    "overloaded": Kind(429, _LIMIT, retry_after_seconds=1),
    # ours
    "protocol": Kind(400, _INVALID),
    "internal_error": Kind(500, _SERVER),
    "request_failed": Kind(500, _SERVER),
    "not_ready": Kind(503, _SERVER, retry_after_seconds=2),
    "plan": Kind(503, _SERVER, retry_after_seconds=2),
    "engine": Kind(503, _SERVER, retry_after_seconds=2),
    "transport": Kind(503, _SERVER, retry_after_seconds=2),
    "connection_closed": Kind(503, _SERVER, retry_after_seconds=2),
}
_UNEXPECTED = KINDS["internal_error"]
_CODE_OF_STATUS = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ApiError(EdgeRuntimeError):
    """A request refused at the rim. `param` names the field that is wrong."""

    def __init__(self, message: str, *, code: str, param: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint, code=code)
        self.param = param


def kind_of(error: EdgeRuntimeError) -> Kind:
    return KINDS.get(error.code, _UNEXPECTED)


def error_body(error: EdgeRuntimeError) -> dict[str, object]:
    """OpenAI's error object; `hint` is ours and only there where it says something."""
    fields: dict[str, object] = {
        "message": error.message,
        "type": kind_of(error).type,
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    return {"error": fields | ({"hint": error.hint} if error.hint else {})}


def error_response(error: EdgeRuntimeError) -> web.Response:
    kind = kind_of(error)
    response = web.json_response(error_body(error), status=kind.status)
    if kind.retry_after_seconds:
        response.headers["Retry-After"] = str(kind.retry_after_seconds)
    if kind.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _of_http(error: web.HTTPException, request: web.Request) -> web.Response:
    """aiohttp's own refusals (no such route, wrong method, too large) in the same clothes."""
    code = _CODE_OF_STATUS.get(error.status, "internal_error" if error.status >= 500 else "bad_request")
    messages = {
        "not_found": f"There is nothing at {request.method} {request.path}.",
        "method_not_allowed": f"{request.path} does not answer to {request.method}.",
        "request_too_large": f"The request body is larger than {request.client_max_size} bytes.",
    }
    response = error_response(ApiError(messages.get(code, f"{error.reason}."), code=code))
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return response


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure leaves here as one JSON object; what nobody foresaw is logged and told without detail."""
    try:
        return await handler(request)
    except EdgeRuntimeError as error:
        if kind_of(error).status >= 500:
            logger.warning("%s %s: %s (%s)", request.method, request.path, error.message, error.code)
        return error_response(error)
    except web.HTTPException as error:
        return _of_http(error, request)
    except web.RequestPayloadError:
        return error_response(ApiError("The request body could not be read.", code="bad_request"))
    except ConnectionError:
        raise
    except Exception:
        logger.exception("%s %s failed unexpectedly", request.method, request.path)
        return error_response(
            ApiError("The server failed unexpectedly; its log says why.", code="internal_error")
        )
