"""API keys: who may call, as hashes.

A key is a random secret shown once. Only its SHA-256 is kept; a tenant is what a key belongs to: requests, cached
prefixes and streams of one tenant are invisible to another. Knows: hashing and matching. Does not know: HTTP, storage.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from edge_runtime.errors import UsageError

PREFIX = "sk-edge-"
DEFAULT_TENANT = "default"
MAX_SECRET_CHARACTERS = 512


def new_secret() -> str:
    """256 random bits, in a form that can be typed into any client."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, without its secret. `is_admin`: may also see devices, pair, revoke and read metrics."""

    secret_sha256: bytes
    tenant: str = DEFAULT_TENANT
    is_admin: bool = True

    def __post_init__(self) -> None:
        if len(self.secret_sha256) != hashlib.sha256().digest_size:
            raise ValueError("an API key is kept as the 32 bytes of its SHA-256")
        if not self.tenant:
            raise ValueError("an API key belongs to a tenant")

    @classmethod
    def of(cls, secret: str, *, tenant: str = DEFAULT_TENANT, is_admin: bool = True) -> ApiKey:
        if not 16 <= len(secret) <= MAX_SECRET_CHARACTERS or not secret.isascii() or not secret.isprintable():
            raise UsageError(
                f"an API key needs 16 to {MAX_SECRET_CHARACTERS} printable ASCII characters",
                hint="leave it out and one is made for you",
            )
        return cls(hash_secret(secret), tenant, is_admin)


class ApiKeys:
    """The keys that open this coordinator."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = list(keys)

    def add(self, key: ApiKey) -> None:
        self._keys.append(key)

    def revoke(self, tenant: str) -> None:
        """Every key of the tenant stops working with the next request."""
        self._keys = [key for key in self._keys if key.tenant != tenant]

    def authenticate(self, authorization: str) -> ApiKey | None:
        """The key named by an `Authorization: Bearer …` header, or None.

        Hashes are compared, in constant time and all of them, so that neither a prefix nor a position shows.
        """
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret or len(secret) > MAX_SECRET_CHARACTERS:
            return None
        given = hash_secret(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.secret_sha256, given):
                found = key
        return found
