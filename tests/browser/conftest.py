"""A browser, and the console over a fake service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.api_server import Server, serving
from tests.support.chromium import started
from tests.support.fake_service import FakeService

expect.set_options(timeout=30_000)  # a machine that runs other tests meanwhile is slow, not wrong


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with started() as browser:
        yield browser


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(FakeService()) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def modules() -> AsyncIterator[Page]:
    """A page that may import the console's modules: `await import("/console/…")` in `evaluate`. One for a test file,
    whose tests need `asyncio(loop_scope="module")`."""
    async with serving(FakeService()) as server, started() as browser:
        page = await browser.new_page()
        await page.goto(server.url)
        yield page
