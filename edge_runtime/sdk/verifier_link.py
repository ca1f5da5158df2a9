"""HTTP to somebody else's model server: one session, patience, limits, our errors.

Every request is whole in itself, so one that broke is sent again. A key goes over https (certificates are checked), or
to this machine; redirects are not followed, lest it go elsewhere. Nothing of a request or a key is logged.

Knows: requests, refusals, retries, events. Does not know: what bodies mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from edge_runtime import errors
from edge_runtime.sdk.sse import SseParser

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 120.0
MAX_RETRIES = 4
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 30.0
MAX_ANSWER_BYTES = 128 << 20  # prompt log-probabilities of a long text are long
MAX_REFUSAL_CHARACTERS = 500
_LATER = (429, 502, 503, 504)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DONE = "[DONE]"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """`timeout_seconds`: longest silence of the server. `ca_file`: authorities to trust instead of the system's."""

    api_key: str = ""
    timeout_seconds: float = SILENCE_SECONDS
    ca_file: Path | None = None
    allow_plain_http: bool = False  # send the key even where everybody on the way can read it

    def __repr__(self) -> str:
        return f"LinkOptions(timeout_seconds={self.timeout_seconds}, ca_file={self.ca_file})"


class VerifierLink:
    """To the server at `url` (with or without /v1 at its end). Belongs to the event loop that uses it first."""

    def __init__(self, url: str, options: LinkOptions) -> None:
        """Raises UsageError for what is no http address, and for a key that would travel in the clear."""
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise errors.UsageError(
                f"{parts.scheme}://{parts.hostname or ''} is no address of a server",
                hint="give it as https://HOST or http://HOST:PORT, and a key apart from it",
            )
        is_open = parts.scheme == "http" and parts.hostname not in _LOOPBACK
        if options.api_key and is_open and not options.allow_plain_http:
            raise errors.UsageError(
                f"the API key would travel to {parts.hostname} in the clear",
                hint="use https, or a tunnel to this machine; allow_plain_http sends it anyway",
            )
        self._options = options
        self._session: aiohttp.ClientSession | None = None
        self.requests = 0  # sent, those sent again included

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str) -> Json:
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Json) -> Json:
        """The answer's JSON object. Sent again where the link broke or the server said "later"."""
        return await self._whole("POST", path, body)

    async def _whole(self, method: str, path: str, body: Json | None) -> Json:
        pause = Pauses()
        while True:
            try:
                async with self._response(method, path, body, pause) as answer:
                    return await self._object(answer)
            except errors.ConnectionClosed:
                if not await pause.again():
                    raise

    @asynccontextmanager
    async def events(self, path: str, body: Json) -> AsyncIterator[AsyncIterator[Json]]:
        """Server-sent events as JSON objects, until [DONE]. Leaving the block early tells the server to stop.

        The iterator raises ConnectionClosed where the stream ends before that.
        """
        async with (
            self._response("POST", path, body, Pauses()) as answer,
            contextlib.aclosing(self._events(answer)) as found,
        ):
            yield found

    async def _events(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[Json, None]:
        parser = SseParser()
        try:
            async for chunk in answer.content.iter_any():
                for event in parser.feed(chunk):
                    if event.data == _DONE:
                        return
                    found = _parsed(event.data)
                    if "error" in found:
                        raise refusal(500, found, "")
                    yield found
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise _closed(problem) from None
        raise errors.ConnectionClosed(
            "the server ended its stream without an end mark", hint="see the server's log"
        )

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: Json | None, pause: Pauses
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        while True:
            self.requests += 1
            try:
                answer = await self._open().request(method, self.url + path, json=body, allow_redirects=False)
            except aiohttp.ClientConnectorCertificateError as problem:
                raise errors.TrustError(
                    f"{self.url} has no certificate that is trusted here: {problem.certificate_error}",
                    hint="give the authority's certificate as ca_file",
                ) from None
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
                raise errors.TransportError(
                    f"nothing answers at {self.url}: {problem}",
                    hint="is the server running, and is this its address?",
                    code="unreachable",
                ) from None
            except (aiohttp.ClientError, TimeoutError) as problem:
                raise _closed(problem) from None
            try:
                if answer.status < 300:
                    yield answer
                    return
                refused = refusal(answer.status, await _object_or_none(answer), self.url + path)
                later = answer.headers.get("Retry-After", "") if answer.status in _LATER else None
            finally:
                answer.close()
            if later is None or not await pause.again(float(later) if later.isdecimal() else None):
                raise refused

    async def _object(self, answer: aiohttp.ClientResponse) -> Json:
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                return _parsed((await _limited(answer)).decode("utf-8", "replace"))
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise _closed(problem) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            silence = self._options.timeout_seconds
            timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=silence)
            headers = {"Authorization": f"Bearer {self._options.api_key}"} if self._options.api_key else {}
            connector = aiohttp.TCPConnector(ssl=_tls(self._options.ca_file))
            self._session = aiohttp.ClientSession(
                headers=headers, timeout=timeout, connector=connector, read_bufsize=1 << 20
            )
        return self._session


class Pauses:
    """Of one request: a few, each longer than the last, or as long as the server asks for (up to a limit)."""

    def __init__(self) -> None:
        self._left = MAX_RETRIES
        self._next_seconds = FIRST_PAUSE_SECONDS

    async def again(self, asked_seconds: float | None = None) -> bool:
        """Wait, and True; or False at once where it was tried often enough."""
        if not self._left or (asked_seconds or 0.0) > LONGEST_PAUSE_SECONDS:
            return False
        self._left -= 1
        await asyncio.sleep(self._next_seconds if asked_seconds is None else asked_seconds)
        self._next_seconds *= 3
        return True


def refusal(status: int, body: object, place: str) -> errors.EdgeRuntimeError:
    """Our error for an answer that is none. Servers write {"error": {"message"}}, {"message"} or {"detail"}."""
    fields = body if isinstance(body, dict) else {}
    inner = fields.get("error", fields)
    said = inner if isinstance(inner, str) else ""
    if isinstance(inner, dict):
        said = str(inner.get("message") or inner.get("detail") or "")
    message = said[:MAX_REFUSAL_CHARACTERS] or f"the server answered with HTTP status {status}"
    if status in (401, 403):
        return errors.TrustError(f"the server refuses the API key: {message}", hint="give the server's key")
    if status in (404, 405, 501):
        return errors.UsageError(f"the server has no {place}: {message}", code="no_such_path")
    if status in (429, 503):
        return errors.CapacityError(
            f"the server is overloaded: {message}", hint="try later", code="overloaded"
        )
    if 300 <= status < 500:
        return errors.UsageError(f"the server refuses: {message}", code="refused")
    return errors.RequestFailed(f"the server failed: {message}", hint="see the server's log")


def _parsed(text: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise errors.ProtocolError(
            "the server did not answer with JSON", hint="is it a model server?"
        ) from None
    if not isinstance(value, dict):
        raise errors.ProtocolError("the server did not answer with a JSON object")
    return value


async def _limited(answer: aiohttp.ClientResponse) -> bytes:
    pieces = bytearray()
    async for chunk in answer.content.iter_any():
        pieces += chunk
        if len(pieces) > MAX_ANSWER_BYTES:
            raise errors.ProtocolError(f"the server's answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(pieces)


async def _object_or_none(answer: aiohttp.ClientResponse) -> object:
    with contextlib.suppress(ValueError, RecursionError, aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS):
            return json.loads(await _limited(answer))
    return None


def _tls(ca_file: Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as problem:
        raise errors.ConfigError(f"{ca_file}: no certificates can be read: {problem}") from None


def _closed(problem: Exception) -> errors.ConnectionClosed:
    if isinstance(problem, TimeoutError):
        return errors.ConnectionClosed(
            "the server was silent for too long", hint="give it more time: timeout_seconds"
        )
    reason = str(problem) or type(problem).__name__
    return errors.ConnectionClosed(f"the connection to the server broke: {reason}", hint="see its log")
