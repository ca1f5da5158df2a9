"""The HTTP application: every route in one list, and how it is served.

Knows: which path goes to which handler under which access. Does not know: what happens behind a handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from aiohttp import web

from coordinator.api import admin, health, metrics
from coordinator.api.body import MAX_BODY_BYTES
from coordinator.api.context import API, Api
from coordinator.api.errors import error_middleware
from coordinator.api.guard import Access, Routes, add_security_headers, auth_middleware, origin_middleware
from coordinator.api.keys import ApiKeys
from coordinator.api.openai import drafting, embeddings, handlers, models, tokenizer
from coordinator.api.pages import add_console
from coordinator.service import Service

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
REQUEST_HEADER_SECONDS = 30  # for the whole head of a request, and for an idle connection
SHUTDOWN_SECONDS = 2.0  # for generations under way; a stream that is cut can be resumed


def create_app(
    service: Service,
    *,
    api_keys: ApiKeys,
    allowed_hosts: Collection[str] = LOCAL_HOSTS,
    console: bool = True,
) -> web.Application:
    """The whole API over a service. `allowed_hosts`: names and addresses a client may have used, without ports."""
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    routes = Routes(app.router)
    app[API] = Api(service, health.Readiness(service), metrics.Metrics(service))
    app.middlewares.extend(
        (error_middleware, origin_middleware(allowed_hosts), auth_middleware(api_keys, routes))
    )
    app.on_shutdown.append(_end_streams)
    app.on_response_prepare.append(add_security_headers)
    _add_routes(routes)
    if console:
        add_console(routes)
    return app


async def _end_streams(app: web.Application) -> None:
    app[API].stopping.set()


def _add_routes(routes: Routes) -> None:
    routes.add_get("/health", health.health, Access.PUBLIC)
    routes.add_get("/ready", health.ready, Access.PUBLIC)
    routes.add_get("/metrics", metrics.metrics, Access.ADMIN)
    routes.add_get("/v1/models", models.list_models, Access.KEY)
    routes.add_get("/v1/models/{model:.+}", models.show_model, Access.KEY)
    routes.add("POST", "/v1/chat/completions", handlers.create_chat, Access.KEY)
    routes.add("POST", "/v1/completions", handlers.create_completion, Access.KEY)
    routes.add("POST", "/v1/embeddings", embeddings.create_embeddings, Access.KEY)
    routes.add("GET", "/v1/drafting", drafting.draft, Access.KEY)
    routes.add_get("/v1/tokenizer", tokenizer.show_tokenizer, Access.KEY)
    routes.add("GET", "/v1/requests/{request}/stream", handlers.resume_stream, Access.KEY)
    routes.add_get("/admin/status", admin.show_status, Access.ADMIN)
    routes.add("GET", "/admin/events", admin.stream_status, Access.ADMIN)
    routes.add("POST", "/admin/join-links", admin.create_join_link, Access.ADMIN)
    routes.add("POST", "/admin/devices/{device}/revoke", admin.revoke_device, Access.ADMIN)


async def serve(app: web.Application, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, int]:
    """Listen, and return what to clean up and the real port (port 0: a free one).

    A client that goes away cancels its handler, which closes its generations.
    """
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        keepalive_timeout=REQUEST_HEADER_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
        access_log=None,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await asyncio.shield(runner.cleanup())
        raise
    address = runner.addresses[0]
    return runner, int(address[1])
