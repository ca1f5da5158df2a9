"""A local API on a real socket, requests to it, and what is left of an answer without names and times."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from edge_runtime.local_api.server import LocalApiConfig, serve
from edge_runtime.sdk.sse import ServerEvent, SseParser
from tests.support.api_server import USER_KEY

COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "seed": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 3}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
IDS = {"return_token_ids": True}


@asynccontextmanager
async def local(url: str, **settings: Any) -> AsyncIterator[str]:
    runner, port = await serve(LocalApiConfig(url, **{"draft": "suffix", **settings}))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def post(url: str, path: str, body: Any, key: str = USER_KEY, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, JSON or events)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + path, data=data, headers=headers) as answer,
    ):
        raw = await answer.read()
        if answer.content_type == "text/event-stream":
            assert raw.startswith(b": keep-alive\n\n")
            return answer.status, answer.headers, list(SseParser().feed(raw))
        return answer.status, answer.headers, json.loads(raw)


def without_names(value: Any) -> Any:
    """An answer without what differs from one asking to the next: ids, times."""
    if isinstance(value, ServerEvent):
        data = value.data if value.data == "[DONE]" else without_names(json.loads(value.data))
        return data, value.id.rpartition("/")[2], value.name
    if isinstance(value, list):
        return [without_names(each) for each in value]
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name not in ("id", "created")}
    return value


def all_headers(headers: Any) -> dict[str, str]:
    kept = ("Content-Type", "Retry-After", "WWW-Authenticate", "X-Accel-Buffering")
    return {name: headers[name] for name in kept if name in headers}
