"""Who may speak to which route: Host and Origin first, then the key, then what every response carries.

Access is looked up by the matched route object, never by the text of the URL, and a route nobody classified needs an
admin's key. Knows: headers and routes. Does not know: what routes do.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from coordinator.api.errors import ApiError
from coordinator.api.keys import ApiKey, ApiKeys
from coordinator.api.socket_key import authorization_of

RouteHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_KEY = web.RequestKey("api_key", ApiKey)


class Access(enum.Enum):
    PUBLIC = "public"
    KEY = "key"
    ADMIN = "admin"


class Routes:
    """A router whose every route has a stated access."""

    def __init__(self, router: web.UrlDispatcher) -> None:
        self._router = router
        self._access: dict[web.AbstractRoute, Access] = {}

    def add(self, method: str, path: str, handler: RouteHandler, access: Access) -> None:
        self._access[self._router.add_route(method, path, handler)] = access

    def add_get(self, path: str, handler: RouteHandler, access: Access) -> None:
        """GET and HEAD, for answers that end by themselves."""
        self.add("GET", path, handler, access)
        self.add("HEAD", path, handler, access)

    def access_of(self, match: web.UrlMappingMatchInfo) -> Access:
        if match.http_exception is not None:  # no such route, or not with this method
            return Access.KEY
        return self._access.get(match.route, Access.ADMIN)


def host_name(host: str) -> str:
    """The name in a Host header, without its port: "localhost", "127.0.0.1", "[::1]"."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.partition(":")[0].lower()


def is_own_page(request: web.Request) -> bool:
    """Not sent by a page of another origin. Programs send neither header; our own console sends both, matching."""
    own = {f"{scheme}://{request.host}".lower() for scheme in ("http", "https")}
    origins = request.headers.getall("Origin", [])
    sites = request.headers.getall("Sec-Fetch-Site", [])
    return all(o.lower() in own for o in origins) and all(s in ("same-origin", "none") for s in sites)


def origin_middleware(allowed_hosts: Collection[str]) -> Middleware:
    """Refuses foreign names and foreign pages on every method: a rebound DNS name or a hostile page gets nothing."""
    allowed = {host_name(f"[{h}]" if h.count(":") > 1 and h[0] != "[" else h) for h in allowed_hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or host_name(hosts[0]) not in allowed:
            raise ApiError(
                "This server does not answer to the name in the request's Host header.",
                code="host_not_allowed",
                hint="use the address the coordinator printed, or add the name to its allowed hosts",
            )
        if not is_own_page(request):
            raise ApiError(
                "Requests from pages of another origin are refused.",
                code="origin_not_allowed",
                hint="open the console at the coordinator's own address",
            )
        return await handler(request)

    return check


def auth_middleware(keys: ApiKeys, routes: Routes) -> Middleware:
    """No key, no route, unless the route is public."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        access = routes.access_of(request.match_info)
        if access is Access.PUBLIC:
            return await handler(request)
        given = authorization_of(request)
        key = keys.authenticate(given) if given is not None else None
        if key is None:
            raise ApiError(
                "This needs a valid API key in the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                hint="the coordinator printed one when it started",
            )
        if access is Access.ADMIN and not key.is_admin:
            raise ApiError("This API key may generate, but not administer.", code="not_permitted")
        request[_KEY] = key
        return await handler(request)

    return check


def key_of(request: web.Request) -> ApiKey:
    """The caller's key, on any route that is not public."""
    return request[_KEY]


_CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Server": "edge-runtime",
    "Content-Security-Policy": _CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


async def add_security_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """On every response. There is no CORS header on purpose: other origins have no business here."""
    response.headers.update(_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
