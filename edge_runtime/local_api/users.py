"""One user per API key: a connection, a drafter and a memory of past outputs that no other key ever meets.

A key counts once the coordinator has accepted it; before that, nothing of it is kept, so strangers push nobody out.

Knows: keys, who was there last. Does not know: HTTP requests, what is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from edge_runtime.sdk.drafting import Drafting
from edge_runtime.sdk.http import HttpSession

MAX_USERS = 8  # kept between requests: each may hold a draft model's memory


@dataclass(slots=True)
class User:
    """`was_accepted`: set by whoever hears it from the coordinator."""

    http: HttpSession
    drafting: Drafting
    was_accepted: bool = False
    running: int = 0

    async def close(self) -> None:
        await self.drafting.close()
        await self.http.close()


class Users:
    """One event loop uses it."""

    def __init__(self, make: Callable[[str], User], limit: int = MAX_USERS) -> None:
        self._make = make
        self._limit = limit
        self._kept: dict[bytes, User] = {}  # the last one was there last

    def is_known(self, key: str) -> bool:
        """Whether the coordinator accepted this key since the start, and it is still remembered."""
        return _name(key) in self._kept

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[User]:
        """The key's user, for one request."""
        name = _name(key)
        user = self._kept.get(name) or self._make(key)
        user.running += 1
        try:
            yield user
        finally:
            user.running -= 1
            await self._after(name, user)

    async def _after(self, name: bytes, user: User) -> None:
        kept = self._kept.get(name)
        if user.was_accepted and kept in (None, user):
            self._kept.pop(name, None)
            self._kept[name] = user
        elif kept is not user and not user.running:
            await user.close()
        await self._make_room()

    async def _make_room(self) -> None:
        """Whoever was away longest goes first; nobody whose request runs."""
        for name, user in list(self._kept.items()):
            if len(self._kept) > self._limit and not user.running:
                del self._kept[name]
                await user.close()

    async def close(self) -> None:
        while self._kept:
            _, user = self._kept.popitem()
            await user.close()


def _name(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
