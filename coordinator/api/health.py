"""Alive and ready, told apart: the process answers, and a pipeline can serve.

Knows: when the last probe was and what it said. Does not know: how a probe is made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from coordinator.api.context import API
from coordinator.service import Service
from edge_runtime.errors import EdgeRuntimeError

CACHE_SECONDS = 5.0
PROBE_SECONDS = 15.0


class Readiness:
    """One token through the live pipeline, at most once in CACHE_SECONDS however many ask."""

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._lock = asyncio.Lock()
        self._checked_at = -float("inf")
        self._reason = ""

    async def reason(self) -> str:
        """Why nothing can be served now; "" when ready."""
        async with self._lock:
            if self._clock() - self._checked_at >= CACHE_SECONDS:
                self._reason = await self._probe()
                self._checked_at = self._clock()
            return self._reason

    async def _probe(self) -> str:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._service.probe()
        except TimeoutError:
            return f"the pipeline did not answer a one-token probe within {PROBE_SECONDS:g} seconds"
        except EdgeRuntimeError as error:
            return error.message
        return ""


async def health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    reason = await request.app[API].readiness.reason()
    if not reason:
        return web.json_response({"status": "ready"})
    response = web.json_response({"status": "not ready", "reason": reason}, status=503)
    response.headers["Retry-After"] = "2"
    return response
