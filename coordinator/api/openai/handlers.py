"""From an HTTP request to an answer, for both dialects, and back into a stream that broke.

Knows: bodies, and headers that resume. Does not know: what a body asks for (`wanted`), what chunks look like.
"""

from __future__ import annotations

from aiohttp import web

from coordinator.api.body import read_object
from coordinator.api.context import API
from coordinator.api.errors import ApiError
from coordinator.api.guard import key_of
from coordinator.api.openai.accept import accept
from coordinator.api.openai.resume import parse_position, resume
from coordinator.api.openai.wanted import read_values, read_wanted


async def create_chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _create(request, is_chat=True)


async def create_completion(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _create(request, is_chat=False)


async def resume_stream(request: web.Request) -> web.StreamResponse:
    """GET /v1/requests/{request}/stream"""
    last = request.headers.get("Last-Event-ID", "")
    return await resume(request, parse_position(last, request.match_info["request"]))


async def _create(request: web.Request, *, is_chat: bool) -> web.StreamResponse:
    api = request.app[API]
    values = read_values(api.service, await read_object(request), is_chat=is_chat)
    if "Last-Event-ID" in request.headers:
        if not values["stream"]:
            raise ApiError("Only a stream can be resumed.", code="invalid_value", param="stream")
        return await resume(request, parse_position(request.headers["Last-Event-ID"]))
    wanted = await read_wanted(api.service, values, is_chat=is_chat)
    answer, sources = accept(
        api, key_of(request).tenant, wanted.options, wanted.prompts, wanted.limits, is_chat=is_chat
    )
    return await (answer.stream(request, sources) if wanted.options.stream else answer.whole(sources))
