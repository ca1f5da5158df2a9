"""A request passed on to the coordinator and its answer passed back, byte for byte, as it comes.

Knows: which headers belong to a connection and which to a request. Does not know: what is asked.
"""

from __future__ import annotations

import aiohttp
from aiohttp import web

from edge_runtime.errors import TransportError
from edge_runtime.sdk.http import CONNECT_SECONDS, closed

_UP = ("Authorization", "Content-Type", "Content-Encoding", "Accept", "Accept-Encoding", "Last-Event-ID")
_NOT_DOWN = frozenset(
    {"connection", "content-length", "keep-alive", "transfer-encoding", "upgrade", "server", "date"}
)


class PassThrough:
    """One session for all callers: it holds no key and no cookie. One event loop uses it."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, request: web.Request, data: bytes, authorization: str) -> web.StreamResponse:
        """The coordinator's answer. Raises TransportError where nobody answers; a break later breaks the answer."""
        headers = {name: request.headers[name] for name in _UP if name in request.headers}
        headers |= {"Authorization": authorization} if authorization else {}
        url = self._url + request.path_qs
        try:
            answer = await self._open().request(
                request.method, url, data=data or None, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
            raise unreachable(self._url, problem) from None
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise closed(problem) from None
        try:
            return await self._back(request, answer)
        finally:
            answer.close()

    async def _back(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _NOT_DOWN:
                response.headers[name] = value
        if answer.content_length is not None:
            response.content_length = answer.content_length
        await response.prepare(request)
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        except (aiohttp.ClientError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()  # the caller must see that this was not all
            return response
        await response.write_eof()
        return response


def unreachable(url: str, problem: Exception) -> TransportError:
    return TransportError(
        f"the coordinator at {url} can't be reached: {problem}",
        hint="ask again when it is back",
        code="unreachable",
    )
