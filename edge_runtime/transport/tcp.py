"""TCP addresses as text, and the few things that are done to a link by its descriptor.

Knows: names, numbers, descriptors. Does not know: ZeroMQ, keys, peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator

from edge_runtime.errors import TransportError


def host_and_port(address: str) -> tuple[str, int]:
    text = address.removeprefix("tcp://")
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if "://" in text or not host or not port.isdecimal() or int(port) > 65535:
        raise TransportError(f"{address!r} is not an address", hint="write tcp://HOST:PORT")
    return host, int(port)


def endpoint(address: str) -> str:
    host, port = host_and_port(address)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


async def resolve(address: str) -> str:
    """libzmq is silent about names it can't resolve, so they are resolved here."""
    host, port = host_and_port(address)
    with contextlib.suppress(ValueError):
        return endpoint(f"{ipaddress.ip_address(host)}:{port}")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(
            f"the name {host!r} has no address: {error.strerror}", hint="check the address"
        ) from error
    return endpoint(f"{found[0][4][0]}:{port}")


def peer_address(fd: int) -> str:
    """`HOST:PORT` at the other end of a descriptor of libzmq's, "" if it has gone."""
    with duplicate(fd) as link:
        return "" if link is None else _peer_of(link)


def shut_down(fd: int, remote: str) -> None:
    """Shut one peer's TCP link. libzmq has no call for it; it sees the end of the link as if the peer had left.

    The descriptor may have been closed and given to somebody else meanwhile, hence the look at whom it leads to, on a
    duplicate that can't change between the look and the cut.
    """
    with duplicate(fd) as link, contextlib.suppress(OSError):
        if link is not None and _peer_of(link) == remote:
            link.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def duplicate(fd: int) -> Iterator[socket.socket | None]:
    """A socket of our own on the same link; None where `fd` is closed, or not a socket (any more)."""
    try:
        own = os.dup(fd)
    except OSError:
        yield None
        return
    try:
        link = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        yield None
        return
    with link:
        yield link


def _peer_of(link: socket.socket) -> str:
    try:
        host, port = link.getpeername()[:2]
    except (OSError, ValueError, TypeError):
        return ""
    return f"{host}:{port}"
