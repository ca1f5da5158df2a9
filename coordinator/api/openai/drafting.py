"""`GET /v1/drafting`: a WebSocket on which a device sends drafts and gets the ids that are committed.

The first message is JSON: a body of /v1/completions or /v1/chat/completions with its `kind`, or the `resume` of an
earlier one. It is journalled and admitted as ever; then frames of `speculative/wire.py` go both ways. Closing the
socket cancels, as closing a stream does.

Knows: the order of messages, limits on frames. Does not know: what becomes of drafts (the session's business).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import WSCloseCode, WSMsgType, web

from coordinator.api.body import MAX_BODY_BYTES, arriving, parse_object
from coordinator.api.context import API
from coordinator.api.errors import ApiError, error_body, kind_of
from coordinator.api.guard import key_of
from coordinator.api.openai.answer import Answer
from coordinator.api.openai.choices import drained
from coordinator.api.openai.drafting_opening import Opened, open_or_resume
from coordinator.api.openai.frame_rate import FrameRate
from coordinator.api.socket_key import PROTOCOL
from coordinator.service import Service, TokenEvent
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.messages import Draft
from edge_runtime.server_events import WRITE_SECONDS, encode_json
from edge_runtime.speculative.wire import CommittedEncoder, CommittedFrame, DraftDecoder

OPENING_SECONDS = 30.0
PING_SECONDS = 20.0


async def draft(request: web.Request) -> web.StreamResponse:
    """GET /v1/drafting"""
    socket = web.WebSocketResponse(
        compress=False,
        max_msg_size=MAX_BODY_BYTES,
        heartbeat=PING_SECONDS,
        timeout=WRITE_SECONDS,
        protocols=(PROTOCOL,),
    )
    if not socket.can_prepare(request).ok:
        raise ApiError(
            "Drafting needs a WebSocket.",
            code="bad_request",
            hint="connect with the header `Upgrade: websocket`",
        )
    await socket.prepare(request)
    api = request.app[API]
    try:
        opened = await open_or_resume(api, key_of(request).tenant, await _first(socket))
        await _send(socket.send_str(encode_json(opened.head)))
        await _Drafting(socket, api.service, opened).run()
    except EdgeRuntimeError as error:
        await _tell(socket, error)
    await socket.close()
    return socket


async def _first(socket: web.WebSocketResponse) -> dict[str, object]:
    async with arriving(OPENING_SECONDS, "Nothing was asked for"):
        message = await socket.receive()
    if message.type is not WSMsgType.TEXT:
        raise ApiError("The first message must be JSON.", code="invalid_json")
    return parse_object(message.data.encode("utf-8", "surrogatepass"))


async def _send(sending: object) -> None:
    """Raises ConnectionError where the client is gone or takes nothing."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await sending  # type: ignore[misc]
    except TimeoutError:
        raise ConnectionResetError("the client stopped reading") from None


async def _tell(socket: web.WebSocketResponse, error: EdgeRuntimeError) -> None:
    """The error object, then the end: the status an HTTP answer would have had is in it."""
    body = error_body(error) | {"status": kind_of(error).status}
    with contextlib.suppress(ConnectionError):
        await _send(socket.send_str(encode_json(body)))
        await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode()[:100])


@dataclass(slots=True)
class _Drafting:
    """One socket of one request."""

    socket: web.WebSocketResponse
    service: Service
    opened: Opened
    waiting: list[TokenEvent] = field(default_factory=list)  # committed, not sent
    news: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Callable[[], float] = time.monotonic

    async def run(self) -> None:
        """Until the request ends or the client leaves, which cancels it. Raises EdgeRuntimeError, ConnectionError."""
        try:
            async with asyncio.TaskGroup() as tasks:
                parts = [tasks.create_task(part) for part in (self._pump(), self._read())]
                await self._write()
                for part in parts:
                    part.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _pump(self) -> None:
        """From the generation. Closing its events is what cancels it."""
        async with contextlib.aclosing(drained(self.opened.source)) as events:
            async for event in events:
                self.waiting.append(event)
                self.news.set()

    async def _write(self) -> None:
        """All that waits in one frame: what a right draft brought at once costs one header."""
        opened = self.opened
        encoder = CommittedEncoder(opened.vocab_size)
        answer, load = opened.answer, 0.0
        while True:
            await self.news.wait()
            self.news.clear()
            events, self.waiting = self.waiting, []
            for event in events:
                answer.choices[0].absorb(event)
            finish = events[-1].finish_reason
            if events[-1].load != load and not finish:
                load = events[-1].load
                await _send(self.socket.send_bytes(encoder.encode(CommittedFrame(0, (), load=load))))
            position = opened.prompt_tokens + events[0].index
            frame = CommittedFrame(position, tuple(event.id for event in events), finish)
            await _send(self.socket.send_bytes(encoder.encode(frame)))
            if opened.with_text:
                text = "".join(event.text for event in events)
                await _send(self.socket.send_str(encode_json({"text": text, "tokens": events[-1].index + 1})))
            if finish:
                await _send(self.socket.send_str(encode_json(_end(answer, finish))))
                return

    async def _read(self) -> None:
        """Drafts, until the client closes."""
        opened = self.opened
        decoder = DraftDecoder(opened.vocab_size, opened.max_rows)
        rate = FrameRate(self.clock())
        async for message in self.socket:
            if message.type is not WSMsgType.BINARY:
                raise ApiError("After the first message only drafts are taken.", code="bad_request")
            frame = decoder.decode(message.data)
            if rate.allows(self.clock()):
                drafts = Draft(0, 0, frame.turn, frame.base_row, frame.parents, frame.ids)
                self.service.draft(opened.choice, drafts, opened.drafter)
        raise ConnectionResetError("the client left")


def _end(answer: Answer, finish_reason: str) -> dict[str, object]:
    return {"finish_reason": finish_reason, "usage": answer.usage()}
