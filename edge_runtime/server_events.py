"""Server-sent events: the bytes, and a response that writes them to a client that may be slow or gone.

Knows: framing, keep-alive comments, the deadline of a write. Does not know: what the events say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from aiohttp import web

KEEP_ALIVE_SECONDS = 5.0
WRITE_SECONDS = 30.0  # a client that takes no bytes for so long is gone
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
SMALL_BYTES = 16 << 10  # that a transport takes at once where nothing waits in it

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode_json(value: object) -> str:
    """Compact JSON in one line; non-ASCII as itself, line separators that break naive readers escaped."""
    text = _ENCODER.encode(value)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def encode_event(value: object, *, event_id: str = "", name: str = "") -> bytes:
    lines = [f"event: {name}"] if name else []
    lines += [f"id: {event_id}"] if event_id else []
    return ("\n".join([*lines, f"data: {encode_json(value)}"]) + "\n\n").encode("utf-8")


class EventStream:
    """One streaming response. Nothing is sent, not even the status, before `start`."""

    def __init__(self, request: web.Request, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "X-Accel-Buffering": "no",  # or a proxy in front holds tokens back
                **(headers or {}),
            }
        )

    @property
    def is_started(self) -> bool:
        return self.response.prepared

    async def start(self) -> None:
        """Status, headers and a first comment, so that a client sees life before the first token."""
        if not self.is_started:
            await self.response.prepare(self._request)
            await self.write(KEEP_ALIVE)

    async def write(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone or takes nothing."""
        transport = self._request.transport
        if transport is not None and not transport.get_write_buffer_size() and len(data) <= SMALL_BYTES:
            await self.response.write(data)  # it does not wait: no timer for every token
            return
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self.response.write(data)
        except TimeoutError:
            raise ConnectionResetError("the client stopped reading") from None
