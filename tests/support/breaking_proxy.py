"""A link that breaks at will, between a client and a port of this machine."""

from __future__ import annotations

import asyncio


class BreakingProxy:
    """Forwards bytes to the API, and cuts a connection after so many of an answer's bytes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.cut_after: list[int] = []  # of the next connections; then none are cut
        self._tasks: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        left = self.cut_after.pop(0) if self.cut_after else 1 << 40
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)

        async def upstream() -> None:
            while data := await reader.read(65536):
                up_writer.write(data)

        up = asyncio.ensure_future(upstream())
        try:
            while left > 0 and (data := await up_reader.read(min(left, 65536))):
                writer.write(data)
                await writer.drain()
                left -= len(data)
        except asyncio.CancelledError:
            pass  # the streams' own callback would log it
        finally:
            up.cancel()
            writer.close()
            up_writer.close()
            self._tasks.discard(task)
