"""One drafted request, answered to a plain HTTP client: whole, or as events while its ids come.

Knows: the order of an answer's parts, as the coordinator keeps it. Does not know: sockets of drafts, keys, shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.local_api.draftable import Draftable
from edge_runtime.local_api.errors import body_of, told
from edge_runtime.local_api.shapes import Head, Json, Shapes, plain_usage
from edge_runtime.sdk.draft_stream import DraftTokenStream
from edge_runtime.sdk.results import DRAFT, Result, StreamToken
from edge_runtime.sdk.token_stream import AsyncTokenStream
from edge_runtime.server_events import DONE, KEEP_ALIVE, KEEP_ALIVE_SECONDS, EventStream, encode_event

REFUSAL_SECONDS = 0.2  # a refusal within this time becomes a status; later ones are told inside the stream
ANSWERED_BY_HEADER = "X-Edge-Runtime-Answered-By"


class NotAnswered(Exception):
    """It failed before anything was answered, for a reason of this device's: somebody else may try."""

    def __init__(self, cause: EdgeRuntimeError) -> None:
        super().__init__(cause.message)
        self.cause = cause


class Answering:
    """`asked` asks the target; `stream` is that, or what the draft model takes over from it."""

    def __init__(
        self,
        wanted: Draftable,
        asked: DraftTokenStream,
        stream: AsyncTokenStream,
        *,
        created: int,
        offline_id: str,
    ) -> None:
        self._wanted = wanted
        self._asked = asked
        self._stream = stream
        self._created = created
        self._offline_id = offline_id
        self._said: Json = {}  # of who answers

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Raises NotAnswered where the target told no error and nothing was answered."""
        async with self._stream:
            if self._wanted.stream:
                return await self._streamed(request)
            return await self._whole()

    # ------------------------------------------------------------ whole

    async def _whole(self) -> web.Response:
        try:
            async for _ in self._stream:
                pass
        except EdgeRuntimeError as problem:
            return self._failed(problem)
        result = self._stream.result
        shapes = Shapes(self._wanted, self._head(result))
        body = shapes.whole(result.text, result.token_ids, result.finish_reason, self._usage(result))
        headers = {"X-Request-Id": shapes.head.request_id} | self._mark_header()
        return web.json_response(body | self._mark(), headers=headers)

    def _failed(self, problem: EdgeRuntimeError) -> web.Response:
        """The coordinator's own words, where it said some."""
        if self._asked.refusal is None:
            raise NotAnswered(problem)
        return told(*self._asked.refusal)

    # ------------------------------------------------------------ a stream

    async def _streamed(self, request: web.Request) -> web.StreamResponse:
        writer = _Writer(self, request)
        try:
            async with aclosing(_with_pauses(self._stream, lambda: writer.patience_seconds)) as tokens:
                async for token in tokens:
                    await (writer.pause() if token is None else writer.token(token))
        except EdgeRuntimeError as problem:
            if writer.events is None:
                return self._failed(problem)
            body = self._asked.refusal[1] if self._asked.refusal else body_of(problem)
            await writer.events.write(encode_event(body))
            return writer.events.response
        return await writer.finish()

    # ------------------------------------------------------------ what both have

    def is_accepted(self) -> bool:
        """Whether its head is known: the coordinator took it, or the draft model did."""
        return bool(self._asked.request_id) or self._stream.answered_by == DRAFT

    def _head(self, result: Result) -> Head:
        head = self._asked.head
        return Head(
            self._asked.request_id or self._offline_id,
            self._created,
            str(head.get("model") or result.model),
            head.get("system_fingerprint"),
            int(head.get("seed", result.seed)),
            self._asked.result.prompt_token_ids or result.prompt_token_ids,
        )

    def _usage(self, result: Result) -> Mapping[str, Any]:
        return self._asked.usage or plain_usage(len(result.prompt_token_ids), len(result.token_ids))

    def _mark(self) -> Json:
        """Only where the answer is not the target's; the same from then on."""
        if not self._said and self._stream.answered_by == DRAFT:
            result = self._stream.result
            said = {"answered_by": DRAFT, "target_tokens": result.target_tokens, "model": result.model}
            self._said = {"edge_runtime": said | {"reason": result.offline_reason}}
        return self._said

    def _mark_header(self) -> dict[str, str]:
        return {ANSWERED_BY_HEADER: DRAFT} if self._stream.answered_by == DRAFT else {}


class _Writer:
    """The events of one stream. Nothing is sent, not even the status, before there is a head."""

    def __init__(self, answering: Answering, request: web.Request) -> None:
        self._answering = answering
        self._request = request
        self._shapes: Shapes | None = None
        self._tokens = 0
        self.events: EventStream | None = None

    @property
    def patience_seconds(self) -> float:
        return REFUSAL_SECONDS if self.events is None else KEEP_ALIVE_SECONDS

    async def pause(self) -> None:
        if self.events is not None:
            await self.events.write(KEEP_ALIVE)
        elif self._answering.is_accepted():
            await self._start()

    async def token(self, token: StreamToken) -> None:
        shapes = await self._start()
        self._tokens = token.index + 1
        await self._send(shapes.piece(token.id, token.text))

    async def finish(self) -> web.StreamResponse:
        shapes, result = await self._start(), self._answering._stream.result
        await self._send(shapes.closing(result.finish_reason))
        assert self.events is not None
        if shapes.wanted.include_usage:
            usage = shapes.usage(self._answering._usage(result)) | self._answering._mark()
            await self.events.write(encode_event(usage))
        await self.events.write(DONE)
        return self.events.response

    async def _start(self) -> Shapes:
        if self._shapes is None or self.events is None:
            answering = self._answering
            self._shapes = Shapes(answering._wanted, answering._head(answering._stream.result))
            headers = {"X-Request-Id": self._shapes.head.request_id} | answering._mark_header()
            self.events = EventStream(self._request, headers)
            await self.events.start()
            opening = self._shapes.opening()
            if opening is not None:
                await self.events.write(encode_event(opening | answering._mark()))
        return self._shapes

    async def _send(self, chunk: Json | None) -> None:
        if chunk is not None and self.events is not None and self._shapes is not None:
            data = chunk | self._answering._mark()
            await self.events.write(encode_event(data, event_id=self._shapes.event_id(self._tokens)))


async def _with_pauses(stream: AsyncTokenStream, patience: Any) -> AsyncGenerator[StreamToken | None, None]:
    """Tokens, and None whenever none came for `patience()` seconds."""
    tokens = aiter(stream)
    coming: asyncio.Task[StreamToken | None] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(tokens))
            done, _ = await asyncio.wait({coming}, timeout=patience())
            if not done:
                yield None
                continue
            token, coming = coming.result(), None
            if token is None:
                return
            yield token
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})


async def _next(tokens: Any) -> StreamToken | None:
    token: StreamToken | None = await anext(tokens, None)
    return token
