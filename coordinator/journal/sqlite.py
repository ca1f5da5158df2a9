"""The journal in SQLite: WAL, synchronous=FULL, one writer thread, group commit.

Every method resolves after the commit that holds its effect. Knows: rows and their encoding. Does not know: threads
(`writer.py`), pragmas and versions (`schema.py`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from coordinator.journal.base import PRUNED_AT_ONCE, DeviceEntry, JournalledRequest, RequestEntry
from coordinator.journal.rules import (
    check_device,
    check_first_index,
    check_rebind,
    duplicate_request,
    no_device,
    no_request,
)
from coordinator.journal.schema import open_database
from coordinator.journal.writer import GroupCommitWriter
from edge_runtime.core import RequestId, SamplingParams, Token, TokenLogprob

SESSION_BLOCK = 256  # numbers reserved at a time, so that most of them cost no fsync


class SqliteJournal:
    """Implements Journal. Opening may take a moment (a check of the file): do it before serving."""

    def __init__(self, path: Path) -> None:
        self._next_session = 0  # of the block in hand; touched by the writer thread only
        self._sessions_left = 0
        self._writer = GroupCommitWriter(lambda: open_database(path), on_rollback=self._forget_block)

    def _forget_block(self) -> None:
        self._sessions_left = 0

    # ------------------------------------------------------------ devices

    async def record_device(self, entry: DeviceEntry) -> None:
        def work(connection: sqlite3.Connection) -> None:
            check_device(entry, _device(connection, entry.device_id))
            connection.execute(
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?) ON CONFLICT (device_id) DO UPDATE SET"
                " name = excluded.name, paired_at = excluded.paired_at, revoked = excluded.revoked",
                (entry.device_id, entry.name, entry.public_key, entry.paired_at, int(entry.revoked)),
            )

        await self._writer.run(work)

    async def devices(self) -> list[DeviceEntry]:
        def work(connection: sqlite3.Connection) -> list[DeviceEntry]:
            rows = connection.execute("SELECT * FROM devices ORDER BY paired_at, device_id")
            return [_device_entry(row) for row in rows]

        return await self._writer.run(work)

    async def revoke_device(self, device_id: str) -> None:
        def work(connection: sqlite3.Connection) -> None:
            update = "UPDATE devices SET revoked = 1 WHERE device_id = ?"
            if connection.execute(update, (device_id,)).rowcount == 0:
                raise no_device(device_id)

        await self._writer.run(work)

    # ------------------------------------------------------------ join tokens

    async def add_join_token(self, token_hash: bytes, expires_at: float) -> None:
        await self._writer.run(
            lambda connection: (
                connection.execute(
                    "INSERT INTO join_tokens (hash, expires_at) VALUES (?, ?)", (token_hash, expires_at)
                )
                and None
            )
        )

    async def spend_join_token(self, token_hash: bytes, now: float) -> str:
        def work(connection: sqlite3.Connection) -> str:
            row = connection.execute(
                "SELECT expires_at, spent FROM join_tokens WHERE hash = ?", (token_hash,)
            ).fetchone()
            if row is None:
                return "unknown"
            if row[1]:
                return "used"
            if now >= row[0]:
                return "expired"
            connection.execute("UPDATE join_tokens SET spent = 1 WHERE hash = ?", (token_hash,))
            return "ok"

        return await self._writer.run(work)

    # ------------------------------------------------------------ numbers

    async def next_lease(self) -> int:
        return await self._writer.run(lambda connection: _advance(connection, "lease", 1))

    async def next_session(self) -> int:
        def work(connection: sqlite3.Connection) -> int:
            if not self._sessions_left:
                last = _advance(connection, "session", SESSION_BLOCK)
                self._next_session = last - SESSION_BLOCK + 1
                self._sessions_left = SESSION_BLOCK
            number = self._next_session
            self._next_session += 1
            self._sessions_left -= 1
            return number

        return await self._writer.run(work)

    # ------------------------------------------------------------ requests

    async def record_request(self, entry: RequestEntry) -> None:
        def work(connection: sqlite3.Connection) -> None:
            try:
                connection.execute(
                    "INSERT INTO requests (request, entry) VALUES (?, ?)", (entry.request, _packed(entry))
                )
            except sqlite3.IntegrityError:
                raise duplicate_request(entry.request) from None

        await self._writer.run(work)

    async def append_tokens(self, request: RequestId, first_index: int, tokens: Sequence[Token]) -> None:
        rows = [
            (item, token.position, token.id, _packed_logprob(token.logprob), token.finish)
            for item, token in enumerate(tokens, first_index)
        ]

        def work(connection: sqlite3.Connection) -> None:
            number, finished = _request_number(connection, request)
            if finished:
                return
            last = connection.execute("SELECT MAX(item) FROM tokens WHERE request = ?", (number,)).fetchone()[
                0
            ]
            check_first_index(request, first_index, 0 if last is None else last + 1)
            connection.executemany(
                "INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?, ?, ?)", [(number, *row) for row in rows]
            )

        await self._writer.run(work)

    async def finish_request(self, request: RequestId, finish_reason: str, error: str = "") -> None:
        def work(connection: sqlite3.Connection) -> None:
            number, finished = _request_number(connection, request)
            if not finished:
                connection.execute(
                    "UPDATE requests SET finish_reason = ?, error = ? WHERE number = ?",
                    (finish_reason, error, number),
                )

        await self._writer.run(work)

    async def rebind_request(self, request: RequestId, class_map: Sequence[str]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            number, _ = _request_number(connection, request)
            count = connection.execute("SELECT COUNT(*) FROM tokens WHERE request = ?", (number,)).fetchone()[
                0
            ]
            check_rebind(request, count)
            (packed,) = connection.execute(
                "SELECT entry FROM requests WHERE number = ?", (number,)
            ).fetchone()
            entry = replace(_unpacked(packed), class_map=tuple(class_map))
            connection.execute("UPDATE requests SET entry = ? WHERE number = ?", (_packed(entry), number))

        await self._writer.run(work)

    async def request(self, request: RequestId) -> JournalledRequest | None:
        def work(connection: sqlite3.Connection) -> JournalledRequest | None:
            row = connection.execute(
                "SELECT number, entry, finish_reason, error FROM requests WHERE request = ?", (request,)
            ).fetchone()
            return None if row is None else _journalled(connection, row)

        return await self._writer.run(work)

    async def prune_requests(self, accepted_before: float, keep: int, limit: int = PRUNED_AT_ONCE) -> int:
        def work(connection: sqlite3.Connection) -> int:
            finished = connection.execute(
                "SELECT COUNT(*) FROM requests WHERE finish_reason != ''"
            ).fetchone()[0]
            rows = connection.execute(
                "SELECT number, json_extract(entry, '$.accepted_at') FROM requests"
                " WHERE finish_reason != '' ORDER BY number LIMIT ?",
                (limit,),
            ).fetchall()
            too_many = finished - keep
            old = [
                (number,)
                for place, (number, accepted_at) in enumerate(rows)
                if place < too_many or accepted_at < accepted_before
            ]
            connection.executemany("DELETE FROM tokens WHERE request = ?", old)
            connection.executemany("DELETE FROM requests WHERE number = ?", old)
            return len(old)

        return await self._writer.run(work)

    async def unfinished(self) -> list[JournalledRequest]:
        def work(connection: sqlite3.Connection) -> list[JournalledRequest]:
            rows = connection.execute(
                "SELECT number, entry, finish_reason, error FROM requests"
                " WHERE finish_reason = '' ORDER BY number"
            ).fetchall()
            return [_journalled(connection, row) for row in rows]

        return await self._writer.run(work)

    # ------------------------------------------------------------ secrets

    async def secret(self, name: str) -> bytes | None:
        def work(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute("SELECT value FROM secrets WHERE name = ?", (name,)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._writer.run(work)

    async def set_secret(self, name: str, value: bytes) -> None:
        await self._writer.run(
            lambda connection: (
                connection.execute(
                    "INSERT INTO secrets VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                    (name, value),
                )
                and None
            )
        )

    async def close(self) -> None:
        await self._writer.close()


_DeviceRow = tuple[str, str, bytes, float, int]
_RequestRow = tuple[int, str, str, str]


def _device(connection: sqlite3.Connection, device_id: str) -> DeviceEntry | None:
    row = connection.execute("SELECT * FROM devices WHERE device_id = ?", (device_id,)).fetchone()
    return None if row is None else _device_entry(row)


def _device_entry(row: _DeviceRow) -> DeviceEntry:
    return DeviceEntry(row[0], row[1], bytes(row[2]), row[3], bool(row[4]))


def _advance(connection: sqlite3.Connection, name: str, by: int) -> int:
    """Add `by` to a counter and return its new value."""
    row = connection.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ? RETURNING value",
        (name, by, by),
    ).fetchone()
    return int(row[0])


def _request_number(connection: sqlite3.Connection, request: RequestId) -> tuple[int, bool]:
    row = connection.execute(
        "SELECT number, finish_reason != '' FROM requests WHERE request = ?", (request,)
    ).fetchone()
    if row is None:
        raise no_request(request)
    return int(row[0]), bool(row[1])


def _journalled(connection: sqlite3.Connection, row: _RequestRow) -> JournalledRequest:
    number, entry, finish_reason, error = row
    rows = connection.execute(
        "SELECT position, id, logprob, finish FROM tokens WHERE request = ? ORDER BY item", (number,)
    )
    tokens = tuple(
        Token(position, identity, _unpacked_logprob(logprob), finish)
        for position, identity, logprob, finish in rows
    )
    return JournalledRequest(_unpacked(entry), tokens, finish_reason, error)


def _packed(entry: RequestEntry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":"))


def _unpacked(text: str) -> RequestEntry:
    fields = json.loads(text)
    sampling = fields["sampling"]
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    for name in ("class_map", "prompt_ids", "stop"):
        fields[name] = tuple(fields[name])
    return RequestEntry(**{**fields, "sampling": SamplingParams(**sampling)})


def _packed_logprob(logprob: TokenLogprob | None) -> str:
    return "" if logprob is None else json.dumps([logprob.logprob, logprob.top], separators=(",", ":"))


def _unpacked_logprob(text: str) -> TokenLogprob | None:
    if not text:
        return None
    value, top = json.loads(text)
    return TokenLogprob(value, tuple((token, each) for token, each in top))
