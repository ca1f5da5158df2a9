"""A Hugging Face hub of one model, on a local socket, that can lose connections."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

COMMIT = "c" * 40


@dataclass
class StubHub:
    """`with StubHub("org/model", files) as hub: hub.url`; runs in a thread of its own.

    After `cut_after_bytes` of the first file longer than that the connection is lost, and the hub is out of order
    until `mend` is called.
    """

    name: str
    files: dict[str, bytes]
    lfs: dict[str, str] = field(default_factory=dict)  # path -> sha256, for files the hub promises a hash of
    cut_after_bytes: int = 0
    ranges: list[tuple[str, int]] = field(default_factory=list)  # (file, first byte) of each GET
    down: bool = False
    _port: int = 0

    def __enter__(self) -> StubHub:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def mend(self) -> None:
        self.cut_after_bytes = 0
        self.down = False

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run(ready))

    async def _run(self, ready: threading.Event) -> None:
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{org}/{name}", self._info)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{path:.+}", self._file)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def _missing(self, request: web.Request) -> web.Response | None:
        if f"{request.match_info['org']}/{request.match_info['name']}" == self.name:
            return None
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        return web.json_response({"error": "Repository not found"}, status=404, headers=headers)

    def _lfs(self, path: str) -> dict[str, Any]:
        if path not in self.lfs:
            return {}
        size = len(self.files[path])
        return {"lfs": {"sha256": self.lfs[path], "size": size, "pointerSize": 130}}

    async def _info(self, request: web.Request) -> web.Response:
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": _etag(data)} | self._lfs(path)
            for path, data in self.files.items()
        ]
        info = {"_id": "1", "id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings}
        return self._missing(request) or web.json_response(
            info | {"private": False, "tags": [], "downloads": 0}
        )

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        if self.down:
            return web.Response(status=503)
        if path not in self.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        data = self.files[path]
        first = _first_byte(request.headers.get("Range", ""))
        response = web.StreamResponse(status=206 if first else 200)
        response.headers.update(
            {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        )
        if first:
            response.headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        response.content_length = len(data) - first
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        self.ranges.append((path, first))
        if self.cut_after_bytes and len(data) > self.cut_after_bytes:
            self.down = True
            await response.write(data[: self.cut_after_bytes])
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(data[first:])
        return response


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _first_byte(header: str) -> int:
    return int(header.removeprefix("bytes=").partition("-")[0]) if header else 0
