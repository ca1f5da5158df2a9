"""Who may speak to the local API: this machine, unless told otherwise, and never a page of another origin.

A browser on this machine can be made to send requests anywhere; a name that was rebound to 127.0.0.1, or a hostile
page, gets nothing. Knows: addresses, Host and Origin. Does not know: keys, routes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence

from edge_runtime.errors import UsageError

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


def parse_address(text: str, *, allow_remote: bool = False) -> tuple[str, int]:
    """HOST:PORT (port 0: any). Raises UsageError, also for an address that others can reach, unless allowed."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"{text!r} is not an address to listen at", hint="write 127.0.0.1:PORT")
    if not allow_remote and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines",
            hint="listen at 127.0.0.1, or say --allow-remote if that is meant: the link to it is not encrypted",
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refusal(
    hosts: Sequence[str], origins: Sequence[str], sites: Sequence[str], allowed: Collection[str]
) -> tuple[str, str] | None:
    """(code, message) of a request with these Host, Origin and Sec-Fetch-Site headers; None: it may come in."""
    if len(hosts) != 1 or host_name(hosts[0]) not in allowed:
        return "host_not_allowed", "This server does not answer to the name in the request's Host header."
    own = {f"{scheme}://{hosts[0]}".lower() for scheme in ("http", "https")}
    if not all(each.lower() in own for each in origins):
        return "origin_not_allowed", "Requests from pages of another origin are refused."
    if not all(each in ("same-origin", "none") for each in sites):
        return "origin_not_allowed", "Requests from pages of another origin are refused."
    return None


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1 : host.find("]")].lower()
    return host.partition(":")[0].lower()
