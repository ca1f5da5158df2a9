"""The HTTP application over a fake service, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from coordinator.api.app import create_app, serve
from coordinator.api.keys import ApiKey, ApiKeys
from tests.support.fake_service import FakeService

ADMIN_KEY = "sk-edge-admin-000000000000"
USER_KEY = "sk-edge-user-0000000000000"
OTHER_KEY = "sk-edge-other-000000000000"


@dataclass
class Server:
    """A served application and a session that carries the admin's key."""

    service: FakeService
    port: int
    http: aiohttp.ClientSession
    keys: ApiKeys

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(service: FakeService, port: int = 0) -> AsyncIterator[Server]:
    """Serves until the block ends."""
    keys = ApiKeys(
        (
            ApiKey.of(ADMIN_KEY),
            ApiKey.of(USER_KEY, is_admin=False),
            ApiKey.of(OTHER_KEY, tenant="other", is_admin=False),
        )
    )
    runner, port = await serve(create_app(service, api_keys=keys), port=port)
    try:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {ADMIN_KEY}"}) as http:
            yield Server(service, port, http, keys)
    finally:
        await runner.cleanup()
