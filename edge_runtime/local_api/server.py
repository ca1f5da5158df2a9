"""The local API: its routes, who answers each, and how it is served.

What this device drafts for goes over a drafting socket; everything else is passed on. Where the coordinator has no
drafting socket, or this device can't draft for its model, requests are passed on too, and the log says why.

Knows: paths, keys in headers, when to pass on. Does not know: shapes, sockets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from edge_runtime.errors import EdgeRuntimeError, TransportError, UsageError
from edge_runtime.local_api.answering import ANSWERED_BY_HEADER, Answering, NotAnswered
from edge_runtime.local_api.draftable import CHAT_PATH, COMPLETION_PATH, Draftable, draftable
from edge_runtime.local_api.errors import refused, response_of
from edge_runtime.local_api.guard import LOOPBACK_NAMES, is_loopback, refusal
from edge_runtime.local_api.pass_through import PassThrough
from edge_runtime.local_api.users import User, Users
from edge_runtime.sdk.async_client import SEED_BITS
from edge_runtime.sdk.draft_stream import DraftTokenStream
from edge_runtime.sdk.drafting import MAX_DRAFTED, Drafting
from edge_runtime.sdk.http import HttpSession, NoWebSocket
from edge_runtime.sdk.offline import OfflineModel, is_allowed, offline_model
from edge_runtime.sdk.offline_stream import OfflineTokenStream
from edge_runtime.sdk.results import DRAFT, Question
from edge_runtime.sdk.token_stream import RESUME_SECONDS, AsyncTokenStream
from edge_runtime.sdk.unreachable import is_unreachable

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 1 << 20  # as the coordinator
REQUEST_HEADER_SECONDS = 30
SHUTDOWN_SECONDS = 2.0
_PASSED_ON = (
    ("GET", "/v1/models/{model:.+}"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/tokenizer"),
    ("GET", "/v1/requests/{request}/stream"),
    ("GET", "/ready"),
)


@dataclass(frozen=True, slots=True)
class LocalApiConfig:
    """`api_key` is used for callers who send none; "" leaves them to the coordinator, which refuses them."""

    url: str  # of the coordinator
    api_key: str = field(default="", repr=False)
    draft: str | Path = "auto"
    offline: str = "never"
    host: str = "127.0.0.1"
    port: int = 0
    allowed_hosts: tuple[str, ...] = ()  # further names that clients may use
    timeout_seconds: float = 600.0
    resume_seconds: float = RESUME_SECONDS


class LocalApi:
    """Handlers. `close` at the end."""

    def __init__(self, config: LocalApiConfig) -> None:
        """Raises UsageError: no such drafter, no draft model for offline answers."""
        self._config = config
        self._users = Users(self._user)
        self._drafted_now = 0
        self._pass_through = PassThrough(config.url, config.timeout_seconds)
        self._offline: OfflineModel | None = (
            offline_model(config.draft) if is_allowed(config.offline) else None
        )
        Drafting(
            HttpSession(config.url, "", 1.0), config.draft
        )  # a wrong name is told now, not to the first caller

    def _user(self, key: str) -> User:
        http = HttpSession(self._config.url, key, self._config.timeout_seconds)
        return User(http, Drafting(http, self._config.draft))

    async def close(self) -> None:
        await self._users.close()
        if self._offline is not None:
            await self._offline.close()
        await self._pass_through.close()

    # ------------------------------------------------------------ handlers

    async def health(self, request: web.Request) -> web.Response:
        """This process is alive; /ready says whether the coordinator can serve."""
        return web.json_response({"status": "ok"})

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        return await self._pass_through.send(request, await request.read(), self._authorization(request))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The coordinator's; the draft model's name where nobody else can be asked and it may answer."""
        try:
            return await self.pass_on(request)
        except TransportError as problem:
            if self._offline is None or not is_unreachable(problem):
                raise
            opened = await self._offline.open()
            entry = {"id": opened.name, "object": "model", "created": 0, "owned_by": "edge-runtime"}
            mark = {"edge_runtime": {"answered_by": DRAFT, "reason": problem.message}}
            return web.json_response(
                {"object": "list", "data": [entry]} | mark, headers={ANSWERED_BY_HEADER: DRAFT}
            )

    async def generate(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        authorization = self._authorization(request)
        key = _bearer(authorization)
        wanted = draftable(request.path, data) if _is_plain(request) else None
        if wanted is None or key is None:
            return await self._pass_through.send(request, data, authorization)
        async with self._users.of(key) as user:
            offline = self._may_stand_in(key)
            if user.drafting.is_missing or self._drafted_now >= MAX_DRAFTED:
                try:
                    return await self._pass_through.send(request, data, authorization)
                except TransportError:
                    if offline is None:
                        raise
            try:
                return await self._drafted(request, user, wanted, offline)
            except NotAnswered as failure:
                if isinstance(failure.cause, TransportError) and not isinstance(failure.cause, NoWebSocket):
                    return response_of(failure.cause)
                self._note_missing(user, failure.cause)
        return await self._pass_through.send(request, data, authorization)

    async def _drafted(
        self, request: web.Request, user: User, wanted: Draftable, offline: OfflineModel | None
    ) -> web.StreamResponse:
        body = dict(wanted.body)
        if offline is not None and body.get("seed") is None:
            body["seed"] = secrets.randbits(SEED_BITS)

        async def make_body() -> dict[str, object]:
            return body

        asked = DraftTokenStream(
            user.drafting,
            wanted.path,
            make_body,
            resume_seconds=self._config.resume_seconds,
            falls_back=False,
            retries=0,
        )
        stream: AsyncTokenStream = asked
        if offline is not None:
            stream = OfflineTokenStream(user.http, asked, offline, Question(wanted.path, body))
        offline_id = f"{'chatcmpl' if wanted.is_chat else 'cmpl'}-offline-{secrets.token_hex(12)}"
        self._drafted_now += 1
        answering = Answering(wanted, asked, stream, created=int(time.time()), offline_id=offline_id)
        try:
            return await answering.answer(request)
        finally:
            self._drafted_now -= 1
            user.was_accepted = user.was_accepted or bool(asked.request_id)

    def _may_stand_in(self, key: str) -> OfflineModel | None:
        """Nobody checks keys while the coordinator is away: others than this machine need one that it accepted."""
        is_trusted = (
            is_loopback(self._config.host) or key == self._config.api_key or self._users.is_known(key)
        )
        return self._offline if is_trusted else None

    def _note_missing(self, user: User, cause: EdgeRuntimeError) -> None:
        if isinstance(cause, NoWebSocket) and (cause.status in (401, 403) or cause.status >= 500):
            return  # of the key, or of now; a plain request says better what is wrong
        if not user.drafting.is_missing:
            user.drafting.is_missing = True
            log.warning("no drafts for %s, requests are passed on: %s", self._config.url, cause)

    def _authorization(self, request: web.Request) -> str:
        given = request.headers.get("Authorization", "")
        return given or (f"Bearer {self._config.api_key}" if self._config.api_key else "")


def create_app(config: LocalApiConfig) -> web.Application:
    """Raises UsageError as LocalApi."""
    api = LocalApi(config)
    allowed = {*LOOPBACK_NAMES, config.host, *config.allowed_hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        found = refusal(
            headers.getall("Host", []),
            headers.getall("Origin", []),
            headers.getall("Sec-Fetch-Site", []),
            allowed,
        )
        if found is not None:
            return refused(403, *found)
        try:
            return await handler(request)
        except EdgeRuntimeError as problem:
            return response_of(problem)
        except web.HTTPException as problem:
            return _http_error(problem, request)

    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[check])
    app.router.add_get("/health", api.health)
    app.router.add_get("/v1/models", api.models)
    app.router.add_post(CHAT_PATH, api.generate)
    app.router.add_post(COMPLETION_PATH, api.generate)
    for method, path in _PASSED_ON:
        app.router.add_route(method, path, api.pass_on)

    async def close(_: web.Application) -> None:
        await api.close()

    app.on_cleanup.append(close)
    return app


async def serve(config: LocalApiConfig) -> tuple[web.AppRunner, int]:
    """Listen; what to clean up, and the real port. Raises UsageError where the address can't be had."""
    runner = web.AppRunner(
        create_app(config),
        handler_cancellation=True,  # a client that leaves cancels its request
        keepalive_timeout=REQUEST_HEADER_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
        access_log=None,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as problem:
        await runner.cleanup()
        raise UsageError(
            f"can't listen at {config.host}:{config.port}: {problem.strerror or problem}",
            hint="choose another port",
        ) from None
    except BaseException:
        await asyncio.shield(runner.cleanup())
        raise
    return runner, int(runner.addresses[0][1])


def _is_plain(request: web.Request) -> bool:
    """A JSON body, and no stream that is resumed."""
    is_json = request.content_type == "application/json" and "Content-Encoding" not in request.headers
    return is_json and "Last-Event-ID" not in request.headers


def _bearer(authorization: str) -> str | None:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _http_error(problem: web.HTTPException, request: web.Request) -> web.Response:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    messages = {
        404: f"There is nothing at {request.method} {request.path}.",
        405: f"{request.path} does not answer to {request.method}.",
        413: f"The request body is larger than {MAX_BODY_BYTES} bytes.",
    }
    message = messages.get(problem.status, f"{problem.reason}.")
    return refused(problem.status, codes.get(problem.status, "bad_request"), message)
