"""Nobody gets in: every route against every kind of key, name and page, generated from the router itself."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from coordinator.api import keys as keys_module
from coordinator.api.app import create_app
from coordinator.api.guard import host_name
from coordinator.api.keys import ApiKey, ApiKeys, new_secret
from edge_runtime.errors import UsageError
from tests.support.api_server import ADMIN_KEY, OTHER_KEY, USER_KEY
from tests.support.fake_service import FakeService

PUBLIC = {"/health", "/ready", "/"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
SOME_PATHS = ("/", "/health", "/v1/models", "/v1/completions", "/admin/status", "/nothing", "/console/app.js")


def routes_of_the_app() -> list[tuple[str, str]]:
    app = create_app(FakeService(), api_keys=ApiKeys())
    found = []
    for route in app.router.routes():
        path = route.resource.canonical
        found.append(
            (
                route.method,
                path.replace("{model}", "tiny").replace("{device}", "phone").replace("{request}", "x"),
            )
        )
    return found


ROUTES = routes_of_the_app()


async def status_of(server, method: str, path: str, headers: dict[str, str]) -> int:
    base = {"Authorization": ""} | headers
    async with server.http.request(
        method, server.url + path, headers=base, allow_redirects=False
    ) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["Server"] == "edge-runtime"
        return response.status


def test_the_router_has_what_is_promised():
    paths = {path for _, path in ROUTES}
    assert paths >= PUBLIC | {
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/metrics",
    }
    assert len(ROUTES) > 20


@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if r[1] not in PUBLIC and not r[1].startswith("/console/")]
)
async def test_every_route_needs_a_key(server, method, path):
    for authorization in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {ADMIN_KEY}",
        f"Bearer {ADMIN_KEY[:-1]}",
        ADMIN_KEY,
    ):
        assert await status_of(server, method, path, {"Authorization": authorization}) == 401
    server.keys.revoke("other")
    assert await status_of(server, method, path, {"Authorization": f"Bearer {OTHER_KEY}"}) == 401
    is_admin_only = path.startswith("/admin") or path == "/metrics"
    if is_admin_only:
        assert await status_of(server, method, path, {"Authorization": f"Bearer {USER_KEY}"}) == 403
    if path != "/admin/events":
        assert await status_of(server, method, path, {"Authorization": f"Bearer {ADMIN_KEY}"}) not in (
            401,
            403,
        )


@pytest.mark.parametrize(
    "path",
    sorted(PUBLIC) + [path for method, path in ROUTES if path.startswith("/console/") and method == "GET"],
)
async def test_public_routes_need_none(server, path):
    assert await status_of(server, "GET", path, {}) == 200
    assert await status_of(server, "HEAD", path, {}) == 200


async def test_what_does_not_exist_is_not_told_without_a_key(server):
    for path in (
        "/nothing",
        "/admin",
        "/console/../app.py",
        "/console/%2e%2e/app.py",
        "/console/__init__.py",
    ):
        assert await status_of(server, "GET", path, {}) in (401, 404)
        assert await status_of(server, "GET", path, {"Authorization": f"Bearer {ADMIN_KEY}"}) == 404
    assert await status_of(server, "DELETE", "/v1/models", {}) == 401
    assert await status_of(server, "DELETE", "/v1/models", {"Authorization": f"Bearer {ADMIN_KEY}"}) == 405


FOREIGN = (
    {"Host": "attacker.example"},
    {"Host": "127.0.0.1.attacker.example:{port}"},
    {"Host": "localhost.attacker.example"},
    {"Host": ""},
    {"Origin": "http://attacker.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://localhost:{port}"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none", "Origin": "http://attacker.example"},
    {"Host": "attacker.example", "Origin": "http://attacker.example", "Sec-Fetch-Site": "same-origin"},
)


@pytest.mark.parametrize("method", METHODS)
async def test_foreign_pages_and_names_get_nothing_even_with_a_key(server, method):
    for path, foreign in itertools.product(SOME_PATHS, FOREIGN):
        headers = {name: value.format(port=server.port) for name, value in foreign.items()}
        assert (
            await status_of(server, method, path, headers | {"Authorization": f"Bearer {ADMIN_KEY}"}) == 403
        )


@pytest.mark.parametrize(
    "headers",
    [{}, {"Host": "localhost"}, {"Host": "LOCALHOST:80"}, {"Host": "[::1]:9"}, {"Sec-Fetch-Site": "none"},
     {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}],
)  # fmt: skip
async def test_our_own_names_and_pages_are_welcome(server, headers):
    given = {name: value.format(port=server.port) for name, value in headers.items()}
    assert await status_of(server, "GET", "/health", given) == 200


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("a:1", "a"),
        ("A", "a"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
        ("", ""),
        ("[", ""),
        ("a:b:c", "a"),
    ],
)
def test_host_names(host, name):
    assert host_name(host) == name


def test_keys_are_kept_as_hashes_and_belong_to_tenants():
    secret = new_secret()
    keys = ApiKeys([ApiKey.of(secret, tenant="lab", is_admin=False)])
    found = keys.authenticate(f"Bearer {secret}")
    assert found is not None
    assert (found.tenant, found.is_admin) == ("lab", False)
    assert secret not in repr(vars(keys))
    assert keys.authenticate(f"bearer  {secret}") is found
    for wrong in (
        "",
        "Bearer",
        f"Bearer {secret}x",
        f"Bearer {secret[1:]}",
        f"Token {secret}",
        "Bearer " + "x" * 10**5,
        "Bearer \ud800",
    ):
        assert keys.authenticate(wrong) is None
    assert len({new_secret() for _ in range(100)}) == 100


@pytest.mark.parametrize("secret", ["short", "x" * 513, "schlüssel-schlüssel", "with\nnewline-in-it-"])
def test_bad_keys_are_refused(secret):
    with pytest.raises(UsageError):
        ApiKey.of(secret)


def test_no_secret_is_compared_with_equals():
    """Every comparison of a digest goes through hmac.compare_digest."""
    tree = ast.parse(Path(keys_module.__file__).read_text(encoding="utf-8"))
    sides = [
        s for node in ast.walk(tree) if isinstance(node, ast.Compare) for s in (node.left, *node.comparators)
    ]
    assert not {side.attr for side in sides if isinstance(side, ast.Attribute)} & {"secret_sha256"}
    assert not {side.id for side in sides if isinstance(side, ast.Name)} & {"given", "secret"}
