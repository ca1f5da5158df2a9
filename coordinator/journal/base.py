"""The journal: an interface with an in-memory and an SQLite implementation, held to one test class.

Every method returns once its effect is durable. Knows: entries and their order. Does not know: sessions, agents, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.core import RequestId, SamplingParams, Token

PRUNED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A paired device. Revoking keeps the row: a revoked key can never pair again under the old name by mistake."""

    device_id: str
    name: str
    public_key: bytes
    paired_at: float  # Unix seconds, for display only
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """An accepted request: all that its output is a function of."""

    request: RequestId
    tenant: str
    bundle: str
    class_map: tuple[str, ...]  # numeric class per layer
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    accepted_at: float


@dataclass(frozen=True, slots=True)
class JournalledRequest:
    entry: RequestEntry
    tokens: tuple[Token, ...]
    finish_reason: str  # "" while unfinished
    error: str  # the sentence, where it failed


class Journal(Protocol):
    async def record_device(self, entry: DeviceEntry) -> None: ...
    async def devices(self) -> list[DeviceEntry]: ...
    async def revoke_device(self, device_id: str) -> None: ...

    async def add_join_token(self, token_hash: bytes, expires_at: float) -> None: ...
    async def spend_join_token(self, token_hash: bytes, now: float) -> str:
        """ "ok", or why not: "unknown", "used", "expired". Spending is atomic."""
        ...

    async def next_lease(self) -> int:
        """1, 2, 3, … never the same twice, also after a restart."""
        ...

    async def next_session(self) -> int:
        """Likewise (may reserve blocks: numbers may be skipped, never reused)."""
        ...

    async def record_request(self, entry: RequestEntry) -> None: ...
    async def append_tokens(self, request: RequestId, first_index: int, tokens: Sequence[Token]) -> None:
        """Tokens first_index, first_index + 1, … Appending what is there, or to a finished one, changes nothing."""
        ...

    async def finish_request(self, request: RequestId, finish_reason: str, error: str = "") -> None: ...
    async def rebind_request(self, request: RequestId, class_map: Sequence[str]) -> None:
        """Accepted again for other numeric classes. Raises UsageError once it has tokens: they are of the old ones."""
        ...

    async def request(self, request: RequestId) -> JournalledRequest | None: ...
    async def prune_requests(self, accepted_before: float, keep: int, limit: int = PRUNED_AT_ONCE) -> int:
        """Forget finished requests, oldest first: those accepted before then, and all but the latest `keep`.

        At most `limit` at a time, so that nobody waits long behind it; returns how many.
        """
        ...

    async def unfinished(self) -> list[JournalledRequest]: ...

    async def secret(self, name: str) -> bytes | None:
        """A named secret of the coordinator (hash of an API key, say)."""
        ...

    async def set_secret(self, name: str, value: bytes) -> None: ...
    async def close(self) -> None: ...
