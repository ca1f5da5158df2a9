"""A stream of tokens over a drafting socket: this device guesses ahead, only ids come back, text is made here.

A task of its own reads, drafts and reconnects whether or not the caller asks for the next token. Where the server has
no drafting socket, the stream is an ordinary one.

Knows: the socket's messages and frames, resuming. Does not know: how guesses are made (`speculative`), HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from edge_runtime.core import SamplingParams
from edge_runtime.errors import ConnectionClosed, EdgeRuntimeError, ProtocolError, TransportError
from edge_runtime.sdk.drafting import Drafting
from edge_runtime.sdk.http import MAX_RETRIES, Json, NoWebSocket, closed, error_of
from edge_runtime.sdk.results import StreamToken
from edge_runtime.sdk.token_stream import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    RESUME_SECONDS,
    AsyncTokenStream,
)
from edge_runtime.speculative.controller import Controller
from edge_runtime.speculative.draft_loop import DraftLoop
from edge_runtime.speculative.driver import DrafterThread, Driver
from edge_runtime.speculative.wire import CommittedDecoder, CommittedFrame, DraftEncoder, DraftFrame
from edge_runtime.text import TextStream

log = logging.getLogger(__name__)
PATH = "/v1/drafting"
_RETRY_SECONDS = 1.0  # of a refusal that says "later"
_SEND_SECONDS = 30.0
_LATER = (429, 503)
_NOT_ALLOWED = (401, 403)


class _Told(Exception):
    """The server said what is wrong: nothing broke."""

    def __init__(self, error: EdgeRuntimeError, status: int, body: Json) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status
        self.body = body


class DraftTokenStream(AsyncTokenStream):
    """As AsyncTokenStream."""

    def __init__(
        self,
        drafting: Drafting,
        path: str,
        make_body: Callable[[], Awaitable[Json]],
        *,
        resume_seconds: float = RESUME_SECONDS,
        falls_back: bool = True,
        retries: int = MAX_RETRIES,
    ) -> None:
        """`falls_back`: where there is no drafting socket or MAX_DRAFTED requests are drafted for, ask as ever.

        Else NoWebSocket is raised, and whoever asks counts requests.
        """
        super().__init__(drafting.http, path, make_body, resume_seconds=resume_seconds)
        self.refusal: tuple[int, Json] | None = None  # the status and body of an error that was told
        self.usage: Json = {}  # as the coordinator counts, at the end
        self._falls_back = falls_back
        self._retries = retries
        self._drafting = drafting
        self._kind = "chat" if "chat" in path else "completion"
        self._accepted: _Request | None = None
        self._ready: deque[StreamToken] = deque()
        self._news = asyncio.Event()
        self._received = 0  # tokens, handed to the caller or not
        self._end_reason = ""  # becomes `finish_reason` when the caller has all tokens
        self._outbox: deque[DraftFrame] = deque()
        self._outgoing = asyncio.Event()

    # ------------------------------------------------------------ the caller's side

    async def _run(self) -> AsyncGenerator[StreamToken, None]:
        self._body = (
            await self._make_body()
        )  # before there is seen whether there is room: nothing is awaited after
        if not self._falls_back or (self._drafting.has_room and not self._drafting.is_missing):
            self._begin_timing()
            try:
                async with contextlib.aclosing(self._drafted()) as tokens:
                    async for token in tokens:
                        yield token
                return
            except NoWebSocket as refused:
                if self._received or not self._falls_back:
                    raise
                self._drafting.is_missing = refused.status not in _NOT_ALLOWED
                if self._drafting.is_missing:
                    log.warning("%s has no drafting socket (%s): no drafts", self._drafting.http.url, refused)
        async with contextlib.aclosing(super()._run()) as tokens:
            async for token in tokens:
                yield token

    async def _drafted(self) -> AsyncGenerator[StreamToken, None]:
        task = asyncio.create_task(self._drive())
        self._drafting.follow(task)
        task.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._ready:
                    yield self._hand_out(self._ready.popleft())
                if task.done():
                    self._finish(task)
                    return
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # was raised, or nobody waits for it any more

    def _hand_out(self, token: StreamToken) -> StreamToken:
        self._arrived()
        return self._record(token.id, token.text)

    def _finish(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            raise TransportError(
                "the client was closed during a request",
                hint="close it when all is done",
                code="client_closed",
            )
        task.result()
        self._finish_reason = self._end_reason

    # ------------------------------------------------------------ connections

    async def _drive(self) -> None:
        """Connect, read, and take up again what broke; ask again what was refused for now."""
        attempts, pause, broken_at = 0, FIRST_PAUSE_SECONDS, 0.0
        try:
            while True:
                before = self._received
                try:
                    await self._one_link()
                    return
                except _Told as told:
                    attempts += 1
                    if self._received or told.status not in _LATER or attempts > self._retries:
                        self.refusal = told.status, told.body
                        raise told.error from None
                    await self._release()
                    self.request_id, pause = "", _RETRY_SECONDS
                except TransportError:
                    now = time.monotonic()
                    if self._received > before or not broken_at:
                        broken_at, pause = now, FIRST_PAUSE_SECONDS
                    if self._accepted is None or now - broken_at > self._resume_seconds:
                        raise
                    self._accepted.driver.link_lost()
                    self.resumed += 1
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        finally:
            await self._release()

    async def _one_link(self) -> None:
        """Until the request ends. Raises TransportError where the connection does first."""
        async with self._drafting.http.websocket(PATH) as socket:
            await _sent(socket.send_str(json.dumps(self._opening())))
            head = _object(await self._receive(socket))
            self._outbox.clear()
            if self._accepted is None:
                self._accepted = await self._begin(head)
            else:
                self._accepted.driver.link_resumed()
            writer = asyncio.create_task(self._write(socket, self._accepted.vocab_size))
            try:
                await self._read(socket, self._accepted)
            finally:
                writer.cancel()
                await asyncio.wait({writer})

    def _opening(self) -> Json:
        if self._accepted is not None:
            return {"resume": self.request_id, "after": self._received, "drafter": self._drafting.name}
        return {**self._body, "kind": self._kind, "drafter": self._drafting.name}

    async def _begin(self, head: Json) -> _Request:
        """The request is accepted: make ready to draft for it. It runs meanwhile."""
        try:
            prompt_ids = tuple(int(each) for each in head["prompt_token_ids"])
            sampling = _sampling(head["sampling"])
            digest, vocab_size = str(head["tokenizer"]), int(head["vocab_size"])
            rows = len(prompt_ids) + int(head["max_tokens"])
            stops, stop_ids = list(head["stop"]), [int(each) for each in head["stop_ids"]]
            request_id, model = str(head["id"]), str(head["model"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ProtocolError(f"the answer on a drafting socket has an unknown shape: {problem}") from None
        self.request_id, self._prompt_ids, self.tokenizer = request_id, prompt_ids, digest
        self._head = {
            "seed": sampling.seed,
            "model": model,
            "system_fingerprint": head.get("system_fingerprint"),
        }
        text = TextStream(await self._drafting.tokenizer(digest), prompt_ids, stops)
        loop = DraftLoop(
            len(prompt_ids),
            rows,
            vocab_size,
            Controller(),
            estimates=self._drafting.estimates,
            stop_ids=stop_ids,
        )
        thread = await self._drafting.take(digest)
        driver = Driver(thread, loop, prompt_ids, sampling, self._send)
        return _Request(digest, vocab_size, len(prompt_ids), text, thread, driver)

    async def _release(self) -> None:
        """The drafter is free for another request."""
        request, self._accepted = self._accepted, None
        if request is not None:
            request.driver.end()
            is_sound = request.driver.failure is None
            await self._drafting.give(request.digest, request.thread, is_sound=is_sound)

    # ------------------------------------------------------------ messages

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> str | bytes:
        """Raises _Told, ConnectionClosed."""
        try:
            async with asyncio.timeout(self._drafting.http.timeout_seconds):
                message = await socket.receive()
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise closed(problem) from None
        if message.type is aiohttp.WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionClosed("the drafting socket was closed", hint="see the coordinator's log")
        _raise_if_told(message.data)
        return str(message.data)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, request: _Request) -> None:
        decoder = CommittedDecoder(request.vocab_size)
        while not self._end_reason:
            message = await self._receive(socket)
            if isinstance(message, str):
                raise ProtocolError("a drafting socket sent text in the middle of a request")
            self._take(decoder.decode(message), request)
        with contextlib.suppress(ConnectionClosed):  # all ids are here
            usage = _object(await self._receive(socket)).get("usage") or {}
            self.usage = usage
            details = usage.get("completion_tokens_details") or {}
            self._accepted_drafts = int(details.get("accepted_prediction_tokens") or 0)
            self._rejected_drafts = int(details.get("rejected_prediction_tokens") or 0)

    def _take(self, frame: CommittedFrame, request: _Request) -> None:
        if frame.load is not None:
            request.driver.loaded(frame.load)
            return
        request.driver.committed(frame.position, frame.ids, frame.finish)
        new = frame.ids[request.prompt_tokens + self._received - frame.position :]
        for index, identity in enumerate(new, 1):
            piece = request.text.push(identity, is_last=bool(frame.finish) and index == len(new))
            self._ready.append(StreamToken(identity, piece.text, self._received))
            self._received += 1
        self._end_reason = frame.finish
        self._news.set()

    def _send(self, frame: DraftFrame) -> None:
        self._outbox.append(frame)
        self._outgoing.set()

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, vocab_size: int) -> None:
        """Ends where the link does; reading says so too."""
        encoder = DraftEncoder(vocab_size)
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._outgoing.wait()
                self._outgoing.clear()
                while self._outbox:
                    await _sent(socket.send_bytes(encoder.encode(self._outbox.popleft())))


class _Request:
    """What an accepted request keeps from connection to connection."""

    def __init__(
        self,
        digest: str,
        vocab_size: int,
        prompt_tokens: int,
        text: TextStream,
        thread: DrafterThread,
        driver: Driver,
    ) -> None:
        self.digest = digest
        self.vocab_size = vocab_size
        self.prompt_tokens = prompt_tokens
        self.text = text
        self.thread = thread
        self.driver = driver


async def _sent(sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await sending
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as problem:
        raise closed(problem) from None


def _object(message: str | bytes) -> Json:
    try:
        value = json.loads(message)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError("a drafting socket sent a message that is not a JSON object")
    return value


def _raise_if_told(message: str) -> None:
    body = _object(message)
    if "error" in body:
        status = body.get("status")
        status = status if isinstance(status, int) else 500
        raise _Told(error_of(status, body), status, {"error": body["error"]})


def _sampling(fields: Mapping[str, Any]) -> SamplingParams:
    """Raises TypeError or ValueError for what are no sampling parameters."""
    bias = tuple((int(token), float(value)) for token, value in fields.get("logit_bias") or ())
    return SamplingParams(**{**fields, "logit_bias": bias})
