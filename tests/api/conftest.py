"""The API over a fake service, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import pytest

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


ServerFactory = Callable[[FakeService], Awaitable[Server]]


@pytest.fixture
async def start() -> AsyncIterator[ServerFactory]:
    """Serves applications and takes them down after the test."""
    started = []

    async def start_one(service: FakeService) -> Server:
        keys = ApiKeys(
            (
                ApiKey.of(ADMIN_KEY),
                ApiKey.of(USER_KEY, is_admin=False),
                ApiKey.of(OTHER_KEY, tenant="other", is_admin=False),
            )
        )
        runner, port = await serve(create_app(service, api_keys=keys))
        http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        started.append((runner, http))
        return Server(service, port, http, keys)

    yield start_one
    for runner, http in started:
        await http.close()
        await runner.cleanup()


@pytest.fixture
async def server(start: ServerFactory) -> Server:
    return await start(FakeService())
