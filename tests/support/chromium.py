"""A real Chromium: where it is, how it is started, and what a page in it did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium_path() -> str:
    """Where Chromium is. A machine that tests everything must have it; another may do without."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("CI needs Chromium: install the distribution's package `chromium`")
    if found is None:
        pytest.skip("no Chromium on this machine; `apt-get install chromium` gives one")
    return found


@asynccontextmanager
async def started() -> AsyncIterator[Browser]:
    path = chromium_path()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            await browser.close()


def watch(page: Page) -> tuple[list[str], set[str]]:
    """(errors, hosts asked): filled as the page runs."""
    errors: list[str] = []
    hosts: set[str] = set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    return errors, hosts


async def run(page: Page, body: str, given: Any) -> Any:
    """The value of an async function's body over `given`. As JSON: playwright is slow with many small lists."""
    script = f"async (text) => {{ const given = JSON.parse(text); {body} }}"
    wrapped = f"async (text) => JSON.stringify(await ({script})(text))"
    return json.loads(await page.evaluate(wrapped, json.dumps(given)))
