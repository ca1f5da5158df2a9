"""The journal in memory: the twin of the SQLite one, for tests and for coordinators that may forget.

Knows: entries. Does not know: disks; nothing survives the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.journal.base import PRUNED_AT_ONCE, DeviceEntry, JournalledRequest, RequestEntry
from coordinator.journal.rules import (
    check_device,
    check_first_index,
    check_rebind,
    duplicate_request,
    no_device,
    no_request,
)
from edge_runtime.core import RequestId, Token
from edge_runtime.errors import UsageError


class MemoryJournal:
    """Implements Journal."""

    def __init__(self) -> None:
        self._devices: dict[str, DeviceEntry] = {}
        self._join_tokens: dict[bytes, tuple[float, bool]] = {}  # hash -> (expires at, spent)
        self._requests: dict[RequestId, JournalledRequest] = {}
        self._secrets: dict[str, bytes] = {}
        self._lease = 0
        self._session = 0
        self._closed = False

    async def record_device(self, entry: DeviceEntry) -> None:
        self._check_open()
        check_device(entry, self._devices.get(entry.device_id))
        self._devices[entry.device_id] = entry

    async def devices(self) -> list[DeviceEntry]:
        self._check_open()
        return sorted(self._devices.values(), key=lambda entry: (entry.paired_at, entry.device_id))

    async def revoke_device(self, device_id: str) -> None:
        self._check_open()
        if device_id not in self._devices:
            raise no_device(device_id)
        self._devices[device_id] = replace(self._devices[device_id], revoked=True)

    async def add_join_token(self, token_hash: bytes, expires_at: float) -> None:
        self._check_open()
        self._join_tokens[token_hash] = (expires_at, False)

    async def spend_join_token(self, token_hash: bytes, now: float) -> str:
        self._check_open()
        if token_hash not in self._join_tokens:
            return "unknown"
        expires_at, spent = self._join_tokens[token_hash]
        if spent:
            return "used"
        if now >= expires_at:
            return "expired"
        self._join_tokens[token_hash] = (expires_at, True)
        return "ok"

    async def next_lease(self) -> int:
        self._check_open()
        self._lease += 1
        return self._lease

    async def next_session(self) -> int:
        self._check_open()
        self._session += 1
        return self._session

    async def record_request(self, entry: RequestEntry) -> None:
        self._check_open()
        if entry.request in self._requests:
            raise duplicate_request(entry.request)
        self._requests[entry.request] = JournalledRequest(entry, (), "", "")

    async def append_tokens(self, request: RequestId, first_index: int, tokens: Sequence[Token]) -> None:
        held = self._held(request)
        if held.finish_reason:
            return
        count = len(held.tokens)
        check_first_index(request, first_index, count)
        self._requests[request] = replace(held, tokens=held.tokens + tuple(tokens[count - first_index :]))

    async def finish_request(self, request: RequestId, finish_reason: str, error: str = "") -> None:
        held = self._held(request)
        if not held.finish_reason:
            self._requests[request] = replace(held, finish_reason=finish_reason, error=error)

    async def rebind_request(self, request: RequestId, class_map: Sequence[str]) -> None:
        held = self._held(request)
        check_rebind(request, len(held.tokens))
        entry = replace(held.entry, class_map=tuple(class_map))
        self._requests[request] = replace(held, entry=entry)

    async def request(self, request: RequestId) -> JournalledRequest | None:
        self._check_open()
        return self._requests.get(request)

    async def prune_requests(self, accepted_before: float, keep: int, limit: int = PRUNED_AT_ONCE) -> int:
        self._check_open()
        finished = [held for held in self._requests.values() if held.finish_reason]
        too_many = max(0, len(finished) - keep)
        old = [
            held.entry.request
            for number, held in enumerate(finished)
            if number < too_many or held.entry.accepted_at < accepted_before
        ]
        for request in old[:limit]:
            del self._requests[request]
        return len(old[:limit])

    async def unfinished(self) -> list[JournalledRequest]:
        self._check_open()
        return [held for held in self._requests.values() if not held.finish_reason]

    async def secret(self, name: str) -> bytes | None:
        self._check_open()
        return self._secrets.get(name)

    async def set_secret(self, name: str, value: bytes) -> None:
        self._check_open()
        self._secrets[name] = value

    async def close(self) -> None:
        self._closed = True

    def _held(self, request: RequestId) -> JournalledRequest:
        self._check_open()
        held = self._requests.get(request)
        if held is None:
            raise no_request(request)
        return held

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the journal is closed", hint="the coordinator is shutting down")
