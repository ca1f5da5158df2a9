"""What the console and the CLI ask: status, pairing links, revocation, and status as a stream.

Knows: how ClusterStatus becomes JSON. Does not know: what devices do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math

from aiohttp import web

from coordinator.api.context import API
from coordinator.api.errors import ApiError
from coordinator.service import ClusterStatus
from edge_runtime.errors import UsageError
from edge_runtime.server_events import KEEP_ALIVE, KEEP_ALIVE_SECONDS, EventStream, encode_event

EVENT_SECONDS = 1.0
_TICKING = frozenset({"uptime_seconds", "last_seen_seconds", "age_seconds"})  # change by themselves


def status_json(status: ClusterStatus) -> dict[str, object]:
    """The documented shape: the dataclasses' own fields, numbers that are not finite as null."""
    value = _plain(dataclasses.asdict(status))
    assert isinstance(value, dict)
    return value


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fingerprint(value: object) -> object:
    """What has to differ for a status to be news."""
    if isinstance(value, dict):
        return {key: fingerprint(item) for key, item in value.items() if key not in _TICKING}
    if isinstance(value, list):
        return [fingerprint(item) for item in value]
    return value


async def show_status(request: web.Request) -> web.Response:
    return web.json_response(status_json(request.app[API].service.status()))


async def create_join_link(request: web.Request) -> web.Response:
    link = request.app[API].service.create_join_link()
    return web.json_response({"link": link, "command": f"edge-runtime agent --join '{link}'"}, status=201)


async def revoke_device(request: web.Request) -> web.Response:
    device = request.match_info["device"]
    try:
        await request.app[API].service.revoke(device)
    except UsageError as error:
        raise ApiError(error.message, code="device_not_found", param="device", hint=error.hint) from None
    return web.json_response({"device": device, "revoked": True})


async def stream_status(request: web.Request) -> web.StreamResponse:
    """One `status` event at once, then one a second while something changes."""
    service, stopping = request.app[API].service, request.app[API].stopping
    stream = EventStream(request)
    await stream.start()
    last: object = None
    quiet_seconds = 0.0
    while not stopping.is_set():
        status = status_json(service.status())
        if (news := fingerprint(status)) != last:
            last, quiet_seconds = news, 0.0
            await stream.write(encode_event(status, name="status"))
        elif quiet_seconds >= KEEP_ALIVE_SECONDS:
            quiet_seconds = 0.0
            await stream.write(KEEP_ALIVE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVENT_SECONDS):
                await stopping.wait()
        quiet_seconds += EVENT_SECONDS
    return stream.response
