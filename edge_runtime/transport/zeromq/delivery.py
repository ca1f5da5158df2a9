"""What both ends of a link share: what a list looks like on the wire, and how long a good-bye may take.

The first frame of data follows its kind in the same part: each part costs both sides calls, a box and a header.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import zmq

from edge_runtime.errors import ProtocolError
from edge_runtime.transport.base import Frame
from edge_runtime.transport.channel import DATA, Channel

log = logging.getLogger(__name__)
CLOSE_GRACE_SECONDS = 1.0


def packed(parts: Sequence[Frame]) -> Sequence[Frame]:
    """A channel's list as it goes over the wire."""
    return parts if parts[0] != DATA else [b"".join(parts[:2]), *parts[2:]]


def deliver(channel: Channel, parts: list[zmq.Frame]) -> None:
    """A list as it came over the wire."""
    first = parts[0].bytes
    frames = [part.buffer.toreadonly() for part in parts[1:]]
    try:
        if first.startswith(DATA):
            channel.deliver(DATA, [memoryview(first)[1:], *frames])
        else:
            channel.deliver(first, frames)
    except ProtocolError as error:
        log.warning("cut the link to device %s: %s", channel.peer.device_id, error.message)
        channel.abort(error.message)
