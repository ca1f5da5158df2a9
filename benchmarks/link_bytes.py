"""Bytes of drafting links, in both directions: of the protocol's frames, and of the sockets that carry them.

Frames are counted where they are written and read; sockets by the kernel (Linux, `TCP_INFO`): all of the connection,
its HTTP handshake, JSON messages and WebSocket headers, without the headers of TCP and IP.

Knows: the codecs of the drafting link, the sockets of this process's clients. Does not know: requests.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_runtime.sdk.draft_stream import DraftTokenStream
from edge_runtime.speculative.wire import CommittedDecoder, CommittedFrame, DraftEncoder, DraftFrame

_ACKED_RECEIVED = struct.Struct(
    "=QQ"
)  # tcpi_bytes_acked, tcpi_bytes_received of struct tcp_info (linux/tcp.h)
_ACKED_AT = 120


@dataclass(slots=True)
class LinkBytes:
    up: int = 0
    down: int = 0
    up_frames: int = 0
    up_ids: int = 0
    socket_up: int = 0
    socket_down: int = 0


@contextmanager
def counted(found: LinkBytes) -> Iterator[None]:
    """Adds what the drafting links of this process's clients carry meanwhile."""
    encode, decode, read = DraftEncoder.encode, CommittedDecoder.decode, DraftTokenStream._read

    def encoded(encoder: DraftEncoder, frame: DraftFrame) -> bytes:
        data = encode(encoder, frame)
        found.up += len(data)
        found.up_frames += 1
        found.up_ids += len(frame.ids)
        return data

    def decoded(decoder: CommittedDecoder, data: bytes) -> CommittedFrame:
        found.down += len(data)
        return decode(decoder, data)

    async def was_read(stream: DraftTokenStream, link: Any, request: Any) -> None:
        try:
            await read(stream, link, request)
        finally:
            sent, received = socket_bytes(link.get_extra_info("socket"))
            found.socket_up += sent
            found.socket_down += received

    DraftEncoder.encode, CommittedDecoder.decode = encoded, decoded  # type: ignore[method-assign, assignment]
    DraftTokenStream._read = was_read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DraftEncoder.encode, CommittedDecoder.decode = encode, decode  # type: ignore[method-assign]
        DraftTokenStream._read = read  # type: ignore[method-assign]


def socket_bytes(connection: socket.socket | None) -> tuple[int, int]:
    """(sent and acknowledged, received) so far; zeros where the system doesn't say."""
    if connection is None or not sys.platform.startswith("linux"):
        return 0, 0
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(data) < _ACKED_AT + _ACKED_RECEIVED.size:
        return 0, 0
    acked, received = _ACKED_RECEIVED.unpack_from(data, _ACKED_AT)
    return acked, received
