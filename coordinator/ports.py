"""Where the coordinator listens for agents, the same after a restart: paired devices know one address.

Knows: the ports chosen last time, and this machine's own address. Does not know: what listens there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from edge_runtime.errors import TransportError

log = logging.getLogger(__name__)

TRIES = 10
TRY_AGAIN_SECONDS = 0.1

T = TypeVar("T")

WILDCARDS = ("0.0.0.0", "::")


class RememberedPorts:
    """`ports.json` in the state directory. A port that somebody else took meanwhile is chosen anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        self._ports: dict[str, int] = {
            name: port for name, port in dict(found).items() if isinstance(port, int) and 0 < port < 65536
        }

    async def listen(self, name: str, wanted: int, listen: Callable[[int], Awaitable[T]]) -> T:
        """On the port that is wanted; for 0, on the one of last time, or any."""
        remembered = 0 if wanted else self._ports.get(name, 0)
        if remembered:
            for _ in range(TRIES):
                try:
                    return await listen(remembered)
                except TransportError:  # perhaps by a coordinator that is just ending
                    await asyncio.sleep(TRY_AGAIN_SECONDS)
            log.warning(
                "port %d of last time is taken: devices that were paired for it will not find this coordinator",
                remembered,
            )
        return await listen(wanted)

    def remember(self, **ports: int) -> None:
        if ports != self._ports:
            self._ports = ports
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps(ports))
            temporary.rename(self._path)


def reachable_host(host: str) -> str:
    """What others dial to reach a listener bound to `host`: for a wildcard, this machine's address on its network."""
    if host not in WILDCARDS:
        return host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    target = "2001:db8::1" if ":" in host else "192.0.2.1"  # documentation addresses: nothing is sent
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ":" in host else "127.0.0.1"
