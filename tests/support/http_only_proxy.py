"""A proxy that knows no WebSockets, as some in offices: requests pass, an upgrade is refused or never answered.

Knows: the head of the first request of a connection. Does not know: HTTP beyond that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def http_only(port: int, *, answers_upgrades: bool = True) -> AsyncIterator[str]:
    """The address of a proxy before 127.0.0.1:`port`. Where it does not answer upgrades, it keeps them waiting."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"upgrade: websocket" in head.lower():
                if answers_upgrades:
                    writer.write(REFUSAL)
                    await writer.drain()
                else:
                    await reader.read()  # until the client gives up
            else:
                await _pass_on(head, reader, writer, port)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _pass_on(
    head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int
) -> None:
    there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
    there_writer.write(head)
    ways = [
        asyncio.create_task(_copy(reader, there_writer)),
        asyncio.create_task(_copy(there_reader, writer)),
    ]
    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # whoever closes, closes both
    for way in ways:
        way.cancel()
    there_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
