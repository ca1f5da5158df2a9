"""What both ends of a link share: how what arrived is handed on, and how long a good-bye may take."""

from __future__ import annotations

import logging

import zmq

from edge_runtime.errors import ProtocolError
from edge_runtime.transport.channel import Channel

log = logging.getLogger(__name__)
CLOSE_GRACE_SECONDS = 1.0


def deliver(channel: Channel, parts: list[zmq.Frame]) -> None:
    try:
        channel.deliver(parts[0].bytes, [part.buffer.toreadonly() for part in parts[1:]])
    except ProtocolError as error:
        log.warning("cut the link to device %s: %s", channel.peer.device_id, error.message)
        channel.abort(error.message)
