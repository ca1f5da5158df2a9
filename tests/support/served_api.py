"""Fixtures: a coordinator's API over a fake service, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.api_server import serving
from tests.support.fake_service import FakeService


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def url(service: FakeService) -> AsyncIterator[str]:
    async with serving(service) as server:
        yield server.url
