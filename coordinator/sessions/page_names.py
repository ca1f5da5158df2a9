"""What pages of KV are called, so that a later session of the same tenant finds them on the devices.

A name is a keyed hash over everything a page's rows are a function of: the bundle, the numeric classes of all layers,
the adapter, the ids of the page and, through the name of the page before, all ids before it. The key is the tenant's
and never leaves this process: a device can compare names, but neither make one nor guess ids from one, and the same
text of two tenants has different names.

Knows: keys, ids, the chain of names. Does not know: sessions, devices, which pages are kept where.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import PAGE_NAME_BYTES

SECRET_BYTES = 32
_DOMAIN = b"edge-runtime page of KV, version 1"


class PageNames:
    """`secret` is drawn at every start: devices keep no page longer than a coordinator lives."""

    def __init__(self, secret: bytes, bundle: str) -> None:
        self._secret = secret
        self._bundle = bundle

    def chain(
        self,
        tenant: str,
        class_map: Sequence[str],
        ids: Sequence[int],
        *,
        after: bytes = b"",
        adapter: str = "",
    ) -> bytes:
        """Names of the full pages of `ids`, joined. `after`: the name of the page before the first, b"" at row 0."""
        key = hmac.digest(self._secret, _joined(b"tenant", tenant.encode()), "sha256")
        fields = (self._bundle.encode(), *(name.encode() for name in class_map), adapter.encode())
        context = hashlib.sha256(_joined(_DOMAIN, *fields)).digest()
        names, parent = bytearray(), after
        for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
            page = struct.pack(f"<{PAGE_TOKENS}q", *ids[start : start + PAGE_TOKENS])
            parent = hmac.digest(key, _joined(context, parent, page), "sha256")[:PAGE_NAME_BYTES]
            names += parent
        return bytes(names)


def _joined(*fields: bytes) -> bytes:
    """Unambiguous: each after its length."""
    return b"".join(struct.pack("<Q", len(field)) + field for field in fields)
