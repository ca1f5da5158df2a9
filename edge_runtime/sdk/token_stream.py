"""A stream of tokens that survives broken connections.

Events of the API carry an id that says what the client has; after a break the stream is taken up again with it, from
the coordinator's journal. Knows: chunks of completions and chats, resuming. Does not know: who asked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from edge_runtime.errors import ConnectionClosed, ProtocolError, TransportError
from edge_runtime.sdk.http import HttpSession, Json, closed, error_of
from edge_runtime.sdk.results import TARGET, Result, StreamToken
from edge_runtime.sdk.sse import ServerEvent, SseParser
from edge_runtime.sdk.token_record import RecordedStream

RESUME_SECONDS = 30.0  # of failed attempts in a row before a broken stream is given up
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
_DONE = "[DONE]"


class AsyncTokenStream(RecordedStream):
    """One generation of a coordinator's, taken up again where its connection breaks."""

    def __init__(
        self,
        http: HttpSession,
        path: str,
        make_body: Callable[[], Awaitable[Json]],
        *,
        resume_seconds: float = RESUME_SECONDS,
    ) -> None:
        super().__init__()
        self._http = http
        self._resume_seconds = resume_seconds
        self._path = path
        self._make_body = make_body
        self._body: Json = {}
        self._last_event_id = ""
        self._prompt_ids: tuple[int, ...] = ()
        self._was_told = False  # an error event came: the stream ended, nothing broke
        self._head: Mapping[str, Any] = {}
        self._accepted_drafts = self._rejected_drafts = 0
        self.request_id = ""
        self.tokenizer = ""  # digest of the target's, where it was told

    @property
    def result(self) -> Result:
        """What has come so far; the whole once the stream has ended."""
        return Result(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            finish_reason=self._finish_reason,
            timings=self._timings(),
            prompt_token_ids=self._prompt_ids,
            request_id=self.request_id,
            seed=int(self._head.get("seed") or 0),
            model=str(self._head.get("model", "")),
            accepted_draft_tokens=self._accepted_drafts,
            rejected_draft_tokens=self._rejected_drafts,
            target_tokens=len(self._ids),
        )

    @property
    def head(self) -> Mapping[str, Any]:
        """What the target said of the whole answer: `model`, `seed`, `system_fingerprint`; {} before it did."""
        return self._head

    @property
    def answered_by(self) -> str:
        """ "target", or "draft" from the moment this device's draft model answers."""
        return TARGET

    # ------------------------------------------------------------ the connection

    async def _run(self) -> AsyncGenerator[StreamToken, None]:
        """Connect, read, and take up again what broke."""
        self._body = {**await self._make_body(), "stream": True, "return_token_ids": True}
        self._begin_timing()
        broken_at: float | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                async for token in self._connection():
                    broken_at, pause = None, FIRST_PAUSE_SECONDS
                    yield token
                return
            except TransportError:
                now = time.monotonic()
                broken_at = now if broken_at is None else broken_at
                # Without a request id nothing was accepted that we could ask for again.
                if self._was_told or not self.request_id or now - broken_at > self._resume_seconds:
                    raise
                self.resumed += 1
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _connection(self) -> AsyncGenerator[StreamToken, None]:
        """The tokens of one connection. Raises ConnectionClosed where it ends before the stream does."""
        async with self._request() as answer:
            self.request_id = answer.headers.get("X-Request-Id", self.request_id)
            parser = SseParser()
            try:
                async for chunk in answer.content.iter_any():
                    for event in parser.feed(chunk):
                        if event.data == _DONE:
                            return
                        for token in self._tokens(event):
                            yield token
            except (aiohttp.ClientError, TimeoutError) as problem:
                raise closed(problem) from None
        raise ConnectionClosed("the stream ended without its end mark", hint="see the coordinator's log")

    def _request(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if not self.request_id:
            return self._http.response("POST", self._path, body=self._body)
        headers = {"Last-Event-ID": self._last_event_id} if self._last_event_id else {}
        return self._http.response("GET", f"/v1/requests/{self.request_id}/stream", headers=headers)

    # ------------------------------------------------------------ the chunks

    def _tokens(self, event: ServerEvent) -> list[StreamToken]:
        try:
            chunk = json.loads(event.data)
        except ValueError:
            raise ProtocolError("the coordinator sent an event that is not JSON") from None
        if not isinstance(chunk, dict):
            raise ProtocolError("the coordinator sent an event that is not an object")
        if "error" in chunk:
            self._was_told = True
            raise error_of(500, chunk)
        self._head = chunk
        self._prompt_ids = tuple(chunk.get("prompt_token_ids") or self._prompt_ids)
        tokens = [token for entry in chunk.get("choices") or () for token in self._entry(entry)]
        # After the tokens: a break in between must ask for them again.
        self._last_event_id = event.id or self._last_event_id
        return tokens

    def _entry(self, entry: Mapping[str, Any]) -> list[StreamToken]:
        text = entry.get("text")
        if text is None:
            text = (entry.get("delta") or {}).get("content") or ""
        self._prompt_ids = tuple(entry.get("prompt_token_ids") or self._prompt_ids)
        self._finish_reason = entry.get("finish_reason") or self._finish_reason
        ids = entry.get("token_ids") or ()
        if not ids:
            if text:  # text that was held back, without a token of its own
                self._texts.append(text)
            return []
        self._arrived()
        return [self._record(int(identity), "" if item else text) for item, identity in enumerate(ids)]
