"""What one client keeps for drafting: which drafter, its user's past outputs, idle drafters, tokenizers.

It belongs to one client, so to one user: nothing in it is ever seen by another.

Knows: names of drafters, where a draft model may lie. Does not know: requests, sockets.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.errors import ProtocolError, UsageError
from edge_runtime.sdk.drafter_pool import DrafterPool
from edge_runtime.sdk.http import HttpSession
from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.drafters.choose import AUTO, CHOICES, MODEL, make_drafter, tokenizer_digest
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory
from edge_runtime.speculative.driver import DrafterThread
from edge_runtime.speculative.estimates import Estimates
from edge_runtime.text import Decoder

MAX_DRAFTED = (
    4  # requests at a time, each with a drafter (a model, perhaps) of its own; the others get no drafts
)


class Drafting:
    """`spec`: "auto", "model", "suffix", or the directory of a draft model's bundle. One event loop uses it."""

    def __init__(self, http: HttpSession, spec: str | Path) -> None:
        """Raises UsageError for what is neither a drafter's name nor a bundle."""
        name = str(spec)
        self.http = http
        self.name = name if name in CHOICES else AUTO
        self.estimates = Estimates()  # of the last requests: a good start for the next
        self.is_missing = False  # the server has no drafting socket; said once
        self._path = None if name in CHOICES else Path(name)
        if self._path is not None and not self._path.is_dir():
            raise UsageError(
                f"{name!r} is no drafter", hint=f"one of {', '.join(CHOICES)}, or a draft model's bundle"
            )
        self._memories: dict[str, SuffixMemory] = {}  # by the tokenizer's digest
        self._tokenizers: dict[str, Decoder] = {}
        self._pools: dict[str, DrafterPool] = {}
        self._requests: set[asyncio.Task[None]] = set()

    @property
    def has_room(self) -> bool:
        """Whether one more request may be drafted for."""
        return len(self._requests) < MAX_DRAFTED

    def follow(self, request: asyncio.Task[None]) -> None:
        """A request's task: `close` ends it."""
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)

    async def tokenizer(self, digest: str) -> Decoder:
        """Asked for once. Raises ProtocolError where the server sends another than it named."""
        if digest not in self._tokenizers:
            from tokenizers import Tokenizer

            async with self.http.response("GET", "/v1/tokenizer") as answer:
                body = await answer.read()
            if sha256_digest(body) != digest:
                raise ProtocolError("the coordinator's tokenizer is not the one it named", hint="try again")
            self._tokenizers[digest] = Tokenizer.from_str(body.decode())
        return self._tokenizers[digest]

    async def take(self, digest: str) -> DrafterThread:
        """A drafter for ids of this tokenizer, for one request. Raises UsageError, BundleError, CapacityError."""
        if digest not in self._pools:
            self._pools[digest] = DrafterPool(lambda: self._make(digest))
        return await self._pools[digest].take()

    def _make(self, digest: str) -> Drafter:
        memory = self._memories.setdefault(digest, SuffixMemory(tokenizer=digest))
        return make_drafter(self.name, bundle=self._bundle(digest), target_tokenizer=digest, memory=memory)

    async def give(self, digest: str, thread: DrafterThread, *, is_sound: bool) -> None:
        """Back from a request. A drafter that failed is not used again."""
        await self._pools[digest].give(thread, is_sound=is_sound)

    async def close(self) -> None:
        requests = list(self._requests)
        for request in requests:
            request.cancel()
        if requests:
            await asyncio.wait(requests)
        for pool in self._pools.values():
            await pool.close()

    def _bundle(self, digest: str) -> Bundle | None:
        """The one that was named; else the one that ships, where it fits."""
        if self._path is not None:
            return Bundle.open(self._path)
        shipped = shipped_draft()
        if self.name not in (AUTO, MODEL) or not shipped.is_dir():
            return None
        bundle = Bundle.open(shipped)
        return bundle if self.name == MODEL or tokenizer_digest(bundle) == digest else None


def shipped_draft() -> Path:
    """Where the demo's draft model lies, in installations that have one."""
    return Path(__file__).parents[1] / "demo" / "draft"
