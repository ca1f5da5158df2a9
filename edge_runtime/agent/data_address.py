"""Where this device can be dialled by its peers.

Knows: addresses. Does not know: keys, links.
"""

from __future__ import annotations

import socket

from edge_runtime.agent.config import AgentConfig
from edge_runtime.errors import ConfigError

_ANY = ("0.0.0.0", "::", "*")


def data_address(config: AgentConfig, coordinator_address: str) -> str:
    """`tcp://HOST:PORT` to listen at and to tell: the same, so HOST must be one that peers can reach."""
    host = config.data_host or _own_address_towards(coordinator_address)
    if host in _ANY:
        raise ConfigError(
            f"peers can't dial {host}: --data-address needs an address of this device",
            hint="leave it out to use the address that reaches the coordinator, or say none to use the relay",
        )
    return f"tcp://[{host}]:{config.data_port}" if ":" in host else f"tcp://{host}:{config.data_port}"


def _own_address_towards(coordinator_address: str) -> str:
    """The address of the interface that leads there. Connecting a datagram socket sends nothing."""
    host, _, port = coordinator_address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"  # no route there now: peers will be reached through the relay
