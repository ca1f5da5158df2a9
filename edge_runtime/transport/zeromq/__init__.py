"""Links over TCP: ZeroMQ with CURVE. One ROUTER per listener, one DEALER per dialled connection."""

from edge_runtime.transport.zeromq.dialling import DialledChannel, connect
from edge_runtime.transport.zeromq.listening import DEFAULT_LIMITS, Limits, ZeromqListener, listen

__all__ = ["DEFAULT_LIMITS", "DialledChannel", "Limits", "ZeromqListener", "connect", "listen"]
