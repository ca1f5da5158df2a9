"""A coordinator's API over a fake service, on a real socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.support.api_server import serving
from tests.support.drafting import drafter_threads
from tests.support.fake_service import FakeService
from tests.support.model_server import ModelServer, model_server
from tests.support.remote_verifiers import Serve


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def url(service: FakeService) -> AsyncIterator[str]:
    async with serving(service) as server:
        yield server.url


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve("sglang")`: servers that live as long as the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(owner: str = "vllm", **options: object) -> ModelServer:
            return await stack.enter_async_context(model_server(owner, **options))  # type: ignore[arg-type]

        yield make
    assert not drafter_threads()
