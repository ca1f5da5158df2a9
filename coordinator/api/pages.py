"""The console's files: a fixed table read once, so that no path from a request ever reaches the file system.

Knows: names and types. Does not know: what the pages do.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import web

from coordinator.api.guard import Access, RouteHandler, Routes

INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def add_console(routes: Routes) -> None:
    """`/` and `/console/NAME` or `/console/ROOM/NAME` for every file of the package that a browser may have."""
    _add_folder(routes, resources.files("coordinator.console"), "/console")


def _add_folder(routes: Routes, folder: Traversable, prefix: str) -> None:
    for entry in folder.iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if entry.is_dir():
            _add_folder(routes, entry, f"{prefix}/{entry.name}")
        elif suffix in _TYPES:
            path = "/" if entry.name == INDEX else f"{prefix}/{entry.name}"
            routes.add_get(path, _file(entry.read_bytes(), _TYPES[suffix]), Access.PUBLIC)


def _file(data: bytes, content_type: str) -> RouteHandler:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=data, headers={"Content-Type": content_type, "Cache-Control": "no-cache"})

    return handler
