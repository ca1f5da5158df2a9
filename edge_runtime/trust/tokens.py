"""Join tokens and join links: how a new device learns whom to trust, and proves that it was invited.

Knows: their text forms, and that a token is only ever kept as its hash. Does not know: links, registries, clocks.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlsplit

from edge_runtime.errors import TrustError
from edge_runtime.trust.identity import fingerprint, key_from_text, key_to_text

TOKEN_BYTES = 16
TOKEN_LIFETIME_SECONDS = 600.0
_TOKEN_CHARACTERS = 22  # of URL-safe base64
_HINT = "copy the whole link that the coordinator printed, in quotes"


def new_token() -> str:
    """128 random bits, URL-safe."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    """What is stored and compared instead of the token. A random 128-bit token needs neither salt nor stretching."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class JoinLink:
    """`edge://HOST:PORT/?enroll=PORT2&key=SERVER_KEY&token=TOKEN`: where, whose key, and one use of an invitation."""

    host: str
    port: int
    enroll_port: int
    server_key: bytes
    token: str = field(repr=False)

    @property
    def address(self) -> str:
        """Of the listener for registered devices."""
        return f"tcp://{_bracketed(self.host)}:{self.port}"

    @property
    def enroll_address(self) -> str:
        return f"tcp://{_bracketed(self.host)}:{self.enroll_port}"

    @property
    def fingerprint(self) -> str:
        """Of the coordinator's key, as the coordinator prints it."""
        return fingerprint(self.server_key)

    def __str__(self) -> str:
        key = quote(key_to_text(self.server_key), safe="")
        return f"edge://{_bracketed(self.host)}:{self.port}/?enroll={self.enroll_port}&key={key}&token={self.token}"

    @classmethod
    def parse(cls, text: str) -> JoinLink:
        try:
            parts = urlsplit(text.strip())
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True, max_num_fields=8)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise TrustError("this is not a join link", hint=_HINT) from error
        values = dict(pairs)
        if parts.scheme != "edge" or not host or not port or len(values) != len(pairs):
            raise TrustError("this is not a join link: it starts with edge://HOST:PORT/", hint=_HINT)
        if set(values) != {"enroll", "key", "token"}:
            raise TrustError("the join link is not complete: it needs enroll, key and token", hint=_HINT)
        return cls(host, port, _port(values["enroll"]), key_from_text(values["key"]), _token(values["token"]))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text[:6]) < 65536:
        raise TrustError("the join link's enroll port is not a port", hint=_HINT)
    return int(text)


def _token(text: str) -> str:
    if len(text) != _TOKEN_CHARACTERS or not all(c.isascii() and (c.isalnum() or c in "-_") for c in text):
        raise TrustError("the join link's token is cut off or changed", hint=_HINT)
    return text
