"""What a link is: ordered lists of byte frames between two authenticated peers.

Knows: the interface that in-process, ZeroMQ/CURVE, WebSocket and relayed links share, and that one conformance test
(`tests/conformance/`) holds all of them to. Does not know: messages, sessions, or who may do what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Frame = bytes | bytearray | memoryview

MAX_FRAME_BYTES = 64 << 20  # of one frame
MAX_FRAMES = 16  # of one list
MAX_LIST_BYTES = MAX_FRAME_BYTES + (1 << 20)  # of all frames of one list together


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as proved by the handshake."""

    device_id: str  # of the peer's public key
    public_key: bytes  # 32 bytes


class Connection(Protocol):
    """A two-way link. Lists arrive whole, in order, at most once; a full queue makes `send` wait."""

    @property
    def peer(self) -> Peer: ...

    async def send(self, frames: Sequence[Frame]) -> None:
        """Queue one list. Buffers must not be changed afterwards. Raises ConnectionClosed, TransportError (too big)."""
        ...

    async def receive(self) -> list[memoryview]:
        """The next list. Raises ConnectionClosed once the other side has gone and everything was read."""
        ...

    async def close(self) -> None:
        """Idempotent. Wakes a waiting `receive` on both sides with ConnectionClosed."""
        ...


class Listener(Protocol):
    """Accepts connections of admitted peers; refuses all others before a byte of theirs is read by us."""

    @property
    def address(self) -> str:
        """What a peer passes to `connect`, with the real port."""
        ...

    async def accept(self) -> Connection: ...

    async def disconnect(self, device_id: str) -> None:
        """Cut a live connection (a revoked device); nothing it sends afterwards is delivered."""
        ...

    async def close(self) -> None: ...
