"""`GET /v1/tokenizer`: what makes text of ids, for devices that get ids only.

Knows: its bytes and their digest. Does not know: what a device does with them.
"""

from __future__ import annotations

from aiohttp import web

from coordinator.api.context import API


async def show_tokenizer(request: web.Request) -> web.Response:
    """tokenizer.json as the bundle has it; the header `ETag` is its digest."""
    digest, body = request.app[API].service.tokenizer()
    response = web.Response(body=body, content_type="application/json", headers={"ETag": f'"{digest}"'})
    response.enable_compression()
    return response
