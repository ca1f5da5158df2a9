"""What both ends of a link share: what a list looks like on the wire, and how long a good-bye may take.

A small list of data is one part, since each part costs both sides calls, a box and a header:

    "L", number of frames (u8), their lengths (u32 each), the frames

Any other list is its kind, then a part for each frame.

Knows: how a channel's lists lie in parts. Does not know: sockets, keys, windows.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Final

from edge_runtime.errors import ProtocolError
from edge_runtime.transport.base import MAX_FRAMES, Frame
from edge_runtime.transport.channel import DATA, Channel
from edge_runtime.transport.zmq_socket import Part

log = logging.getLogger(__name__)
CLOSE_GRACE_SECONDS: Final = 1.0
IN_ONE: Final = b"L"
IN_ONE_BYTES: Final = 48 << 10  # of all frames together; above it copying them costs more than it saves
_IN_ONE_BYTE: Final = IN_ONE[0]
_HEADS: Final = tuple(struct.Struct(f"!cB{frames}I") for frames in range(MAX_FRAMES + 1))


def packed(parts: Sequence[Frame]) -> Sequence[Frame]:
    """A channel's list, its kind first, as parts. Of data: 1 to MAX_FRAMES flat frames."""
    if parts[0] != DATA:
        return parts
    frames = parts[1:]
    first = head([len(frame) for frame in frames])
    return parts if first is None else [b"".join((first, *frames))]


def head(sizes_bytes: Sequence[int]) -> bytes | None:
    """Of a list in one part; None for a larger one."""
    if sum(sizes_bytes) > IN_ONE_BYTES:
        return None
    return _HEADS[len(sizes_bytes)].pack(IN_ONE, len(sizes_bytes), *sizes_bytes)


def unpacked(part: memoryview) -> list[memoryview]:
    """The frames of a list in one part. Raises ProtocolError where their lengths are not the part's."""
    frames = part[1] if len(part) > 1 else 0
    layout = _HEADS[frames] if frames <= MAX_FRAMES else None
    if layout is None or not frames or len(part) < layout.size:
        raise ProtocolError("a list in one part that says another number of frames")
    _kind, _frames, *sizes = layout.unpack_from(part)
    found, start = [], layout.size
    for size in sizes:
        found.append(part[start : start + size])
        start += size
    if start != len(part):
        raise ProtocolError("a list in one part that has other lengths than it says")
    return found


def deliver(channel: Channel, parts: Sequence[Part]) -> None:
    """A list as it came over the wire."""
    try:
        first = parts[0].buffer.toreadonly()
        if len(parts) == 1 and first and first[0] == _IN_ONE_BYTE:
            channel.deliver(DATA, unpacked(first))
        else:
            channel.deliver(bytes(first), [part.buffer.toreadonly() for part in parts[1:]])
    except ProtocolError as error:
        log.warning("cut the link to device %s: %s", channel.peer.device_id, error.message)
        channel.abort(error.message)
