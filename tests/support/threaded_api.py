"""The API over a fake service on a loop of another thread: as a program without a loop meets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.api_server import serving
from tests.support.fake_service import FakeService


@contextmanager
def threaded_api(service: FakeService, port: int = 0) -> Iterator[str]:
    """Its URL, until the block ends. `port` 0: any."""
    urls: list[str] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with serving(service, port) as server:
            urls.append(server.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
