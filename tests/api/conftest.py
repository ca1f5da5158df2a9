"""The API over a fake service, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.support.api_server import Server, serving
from tests.support.fake_service import FakeService

ServerFactory = Callable[[FakeService], Awaitable[Server]]


@pytest.fixture
async def start() -> AsyncIterator[ServerFactory]:
    """Serves applications and takes them down after the test."""
    async with AsyncExitStack() as stack:

        async def start_one(service: FakeService) -> Server:
            return await stack.enter_async_context(serving(service))

        yield start_one


@pytest.fixture
async def server(start: ServerFactory) -> Server:
    return await start(FakeService())
