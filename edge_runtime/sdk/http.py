"""HTTP to the coordinator: one session, our errors, patience.

Knows: requests, the API's error object, which refusals are worth another try. Does not know: what endpoints return.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from edge_runtime import errors

CONNECT_SECONDS = 10.0
MAX_RETRIES = 3  # of a refusal that says "later"
MAX_RETRY_SECONDS = 5.0
PING_SECONDS = 20.0  # on WebSockets
MAX_MESSAGE_BYTES = 16 << 20  # of a WebSocket
GATEWAY_STATUSES = (502, 503, 504)  # of a proxy that finds nobody behind it

Json = dict[str, Any]

_BY_CODE: Mapping[str, type[errors.EdgeRuntimeError]] = {
    "invalid_api_key": errors.TrustError,
    "not_permitted": errors.TrustError,
    "host_not_allowed": errors.TrustError,
    "origin_not_allowed": errors.TrustError,
    "capacity": errors.CapacityError,
    "context_length_exceeded": errors.CapacityError,
    "overloaded": errors.CapacityError,
    "plan": errors.PlanError,
    "engine": errors.EngineError,
    "transport": errors.TransportError,
    "not_ready": errors.TransportError,
    "unreachable": errors.TransportError,
    "connection_closed": errors.ConnectionClosed,
}


def error_of(status: int, body: object) -> errors.EdgeRuntimeError:
    """Our error for an error object of the API, with its own code and message."""
    fields = body.get("error") if isinstance(body, dict) else None
    if isinstance(body, dict) and isinstance(body.get("reason"), str):
        fields = {"message": body["reason"], "code": "not_ready"}  # of /ready
    if not isinstance(fields, dict):
        # without an error object it was no coordinator that answered
        fields = {"code": "unreachable"} if status in GATEWAY_STATUSES else {}
    code = str(fields.get("code") or "")
    message = str(fields.get("message") or f"the coordinator answered with HTTP status {status}")
    kind = _BY_CODE.get(code)
    if kind is None:
        kind = errors.UsageError if 400 <= status < 500 else errors.RequestFailed
    return kind(message, hint=str(fields.get("hint") or ""), code=code)


class NoWebSocket(errors.TransportError):
    """The handshake was answered with this HTTP status. A plain request says better what is wrong."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"the server refuses a WebSocket: HTTP status {status}",
            hint="ask without drafts",
            code="no_websocket",
        )
        self.status = status


class HttpSession:
    """Requests with the API key, to one base URL. Belongs to the event loop that uses it first."""

    def __init__(self, url: str, api_key: str, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(
                total=None, connect=CONNECT_SECONDS, sock_read=self.timeout_seconds
            )
            self._session = aiohttp.ClientSession(
                headers=self._headers, timeout=timeout, read_bufsize=1 << 20
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def response(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = MAX_RETRIES,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with a good status; anything else is raised. "Later" is waited for, a few times."""
        for attempt in range(retries + 1):
            try:
                answer = await self._open().request(method, self.url + path, json=body, headers=headers)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
                raise self._unreachable(problem) from None
            except (aiohttp.ClientError, TimeoutError) as problem:
                raise closed(problem) from None
            try:
                if answer.status < 400:
                    yield answer
                    return
                refusal = error_of(answer.status, await _json_or_none(answer))
                wait = answer.headers.get("Retry-After", "")
            finally:
                answer.close()
            if attempt == retries or answer.status not in (429, 503) or not wait.isdecimal():
                raise refusal
            await asyncio.sleep(min(float(wait), MAX_RETRY_SECONDS))

    @asynccontextmanager
    async def websocket(self, path: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A WebSocket, closed at the end. Raises NoWebSocket where the server, or something before it, refuses one."""
        connecting = self._open().ws_connect(
            self.url + path, heartbeat=PING_SECONDS, max_msg_size=MAX_MESSAGE_BYTES
        )
        try:
            socket = await connecting
        except aiohttp.WSServerHandshakeError as problem:
            raise NoWebSocket(problem.status) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
            raise self._unreachable(problem) from None
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise closed(problem) from None
        try:
            yield socket
        finally:
            await socket.close()

    async def json(
        self, method: str, path: str, body: Json | None = None, *, retries: int = MAX_RETRIES
    ) -> Json:
        async with self.response(method, path, body=body, retries=retries) as answer:
            try:
                value = await answer.json()
            except (aiohttp.ClientError, TimeoutError) as problem:
                raise closed(problem) from None
            except ValueError:
                raise errors.ProtocolError(f"{self.url}{path} did not answer with JSON") from None
        if not isinstance(value, dict):
            raise errors.ProtocolError(f"{self.url}{path} did not answer with a JSON object")
        return value

    def _unreachable(self, problem: Exception) -> errors.TransportError:
        return errors.TransportError(
            f"nothing answers at {self.url}: {problem}",
            hint="is the coordinator running? Start it with `edge-runtime coordinator`, or give its address",
            code="unreachable",
        )


def closed(problem: Exception) -> errors.ConnectionClosed:
    left = isinstance(problem, aiohttp.ServerDisconnectedError)
    reason = "it closed it" if left else str(problem) or type(problem).__name__
    return errors.ConnectionClosed(
        f"the connection to the coordinator broke: {reason}", hint="see the coordinator's log"
    )


async def _json_or_none(answer: aiohttp.ClientResponse) -> object:
    try:
        return json.loads(await answer.text())
    except (ValueError, aiohttp.ClientError, TimeoutError):
        return None
