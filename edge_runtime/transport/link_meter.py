"""What a peer has sent that never came out of libzmq.

libzmq hands a list over when its last frame is there, and no setting limits how much it holds until then: a peer that
never ends its list could fill our memory unseen. The kernel knows how many bytes a link has received, we know how many
were handed over; the difference is what is held.

Knows: TCP counters (on Linux; elsewhere nothing is measured). Does not know: who the peer is, or what to do about it.
"""

from __future__ import annotations

import socket
import struct

from edge_runtime.transport import tcp
from edge_runtime.transport.base import MAX_LIST_BYTES
from edge_runtime.transport.channel import WINDOW_BYTES

CHECK_SECONDS = 1.0
# A whole list, the window before it, and what the kernel and libzmq buffer.
MAX_HELD_BYTES = MAX_LIST_BYTES + WINDOW_BYTES + (16 << 20)
FRAME_OVERHEAD_BYTES = 42  # of CURVE and ZMTP, at most: counted as handed over
_QUIET_BYTES_PER_SECOND = 100.0  # heartbeats, which are never handed over

_TCP_INFO_BYTES = 136
_BYTES_RECEIVED = struct.Struct("=Q")
_BYTES_RECEIVED_OFFSET = 128  # tcpi_bytes_received in Linux's struct tcp_info


def received_bytes(fd: int) -> int | None:
    """All bytes a TCP link has received so far; None where that can't be known."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    with tcp.duplicate(fd) as link:
        if link is None:
            return None
        try:
            info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return None
    if len(info) < _TCP_INFO_BYTES:
        return None
    return int(_BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_OFFSET)[0])


class LinkMeter:
    """Of one link: count what is handed over, ask whether too much is held."""

    __slots__ = ("_handed_over_bytes", "_started")

    def __init__(self, now: float) -> None:
        self._started = now
        self._handed_over_bytes = 0

    def handed_over(self, size_bytes: int, frames: int) -> None:
        self._handed_over_bytes += size_bytes + frames * FRAME_OVERHEAD_BYTES

    def holds_too_much(self, received: int | None, now: float) -> bool:
        """`received`: all bytes of the link so far, if known."""
        if received is None:
            return False
        heartbeats = (now - self._started) * _QUIET_BYTES_PER_SECOND
        return received - self._handed_over_bytes - heartbeats > MAX_HELD_BYTES
