"""The key that came with a request: in `Authorization`, or, for a page's WebSocket, in its list of subprotocols.

A page cannot set headers on a WebSocket, and a key does not belong into an address, which is logged and remembered.
So a page offers two subprotocols, `edge-runtime.drafting` and `edge-runtime.key.` + the key in base64url without
padding; the server chooses the first, and never repeats the second.
Knows: headers. Does not know: which keys are valid.
"""

from __future__ import annotations

import base64
import binascii

from aiohttp import web

PROTOCOL = "edge-runtime.drafting"
KEY_PREFIX = "edge-runtime.key."
_BEARER = "Bearer "
_OFFERED = 2  # protocols of a page: with ours among them none is ever written to a log as unknown


def authorization_of(request: web.Request) -> str | None:
    """The value an `Authorization` header has or would have; None where there is none, or more than one key."""
    given = request.headers.getall("Authorization", [])
    given += _from_protocols(request)
    return given[0] if len(given) == 1 else None


def _from_protocols(request: web.Request) -> list[str]:
    lists = request.headers.getall("Sec-WebSocket-Protocol", [])
    offered = [name.strip() for each in lists for name in each.split(",")]
    keys = [name.removeprefix(KEY_PREFIX) for name in offered if name.startswith(KEY_PREFIX)]
    if not keys or len(offered) != _OFFERED or PROTOCOL not in offered:
        return []
    try:
        padded = keys[0] + "=" * (-len(keys[0]) % 4)
        return [_BEARER + base64.b64decode(padded, altchars=b"-_", validate=True).decode("utf-8")]
    except (binascii.Error, ValueError):
        return []
