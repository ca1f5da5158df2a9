"""A browser, and the console over a fake service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page

from tests.support.api_server import Server, serving
from tests.support.chromium import started
from tests.support.fake_service import FakeService


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with started() as browser:
        yield browser


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(FakeService()) as server:
        yield server


@pytest.fixture
async def modules(browser: Browser, server: Server) -> Page:
    """A page that may import the console's modules: `await import("/console/…")` in `evaluate`."""
    page = await browser.new_page()
    await page.goto(server.url)
    return page
