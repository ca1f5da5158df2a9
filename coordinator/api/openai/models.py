"""`/v1/models`: the one model this coordinator serves.

Knows: the list and its single entry. Does not know: loading, devices.
"""

from __future__ import annotations

import time

from aiohttp import web

from coordinator.api.context import API
from coordinator.api.openai.prompts import need_model
from coordinator.service import Service


def _entry(service: Service) -> dict[str, object]:
    model, status = service.model, service.status()
    return {
        "id": model.name,
        "object": "model",
        "created": int(time.time() - status.uptime_seconds),
        "owned_by": "edge-runtime",
        "max_model_len": model.max_context_tokens,
        "kind": model.kind,
        "family": model.family,
        "weights": model.weights,
        "bundle": status.bundle,
    }


async def list_models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [_entry(request.app[API].service)]})


async def show_model(request: web.Request) -> web.Response:
    service = request.app[API].service
    need_model(request.match_info["model"], service.model)
    return web.json_response(_entry(service))
