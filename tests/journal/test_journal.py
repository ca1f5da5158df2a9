"""One test class for both journals; then what only a disk can get wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.journal.base import DeviceEntry, Journal, RequestEntry
from coordinator.journal.memory import MemoryJournal
from coordinator.journal.schema import SCHEMA_VERSION
from coordinator.journal.sqlite import SESSION_BLOCK, SqliteJournal
from coordinator.journal.writer import GroupCommitWriter
from edge_runtime.core import RequestId, SamplingParams, Token, TokenLogprob
from edge_runtime.errors import ConfigError, EdgeRuntimeError, TrustError, UsageError


@pytest.fixture(params=["memory", "sqlite"])
async def journal(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Journal]:
    opened: Journal = (
        MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "j" / "journal.db")
    )
    yield opened
    await opened.close()


def device(name: str = "phone", key: int = 1, revoked: bool = False) -> DeviceEntry:
    return DeviceEntry(f"id-{key}", name, bytes([key]) * 32, 1000.0 + key, revoked)


def entry(name: str = "r1") -> RequestEntry:
    sampling = SamplingParams(temperature=0.7, logit_bias=((3, -1.5),), seed=2**64 - 1, top_logprobs=2)
    return RequestEntry(
        RequestId(name),
        "tenant",
        "sha256:ab",
        ("c1", "c2"),
        (1, 2, 300_000),
        sampling,
        64,
        ("\n\n", "é"),
        True,
        12.5,
    )


def tokens(first: int, count: int) -> list[Token]:
    return [
        Token(100 + i, i * i, TokenLogprob(-0.1 * i, ((i, -0.5), (7, -2.25))) if i % 2 else None)
        for i in range(first, first + count)
    ]


class TestJournal:
    async def test_devices_are_kept_in_pairing_order_and_revoking_keeps_the_row(
        self, journal: Journal
    ) -> None:
        await journal.record_device(device("laptop", 2))
        await journal.record_device(device("phone", 1))
        await journal.record_device(device("phone-renamed", 1))
        await journal.revoke_device("id-2")
        assert await journal.devices() == [device("phone-renamed", 1), device("laptop", 2, revoked=True)]

    async def test_a_revoked_key_cannot_pair_again(self, journal: Journal) -> None:
        await journal.record_device(device())
        await journal.revoke_device("id-1")
        with pytest.raises(TrustError, match="revoked"):
            await journal.record_device(device())

    async def test_a_device_id_belongs_to_one_key(self, journal: Journal) -> None:
        await journal.record_device(device())
        with pytest.raises(TrustError, match="another public key"):
            await journal.record_device(DeviceEntry("id-1", "phone", b"x" * 32, 1.0))

    async def test_revoking_an_unknown_device_is_refused(self, journal: Journal) -> None:
        with pytest.raises(UsageError, match="no device"):
            await journal.revoke_device("nobody")

    async def test_a_join_token_is_spent_once_and_in_time(self, journal: Journal) -> None:
        await journal.add_join_token(b"a", 100.0)
        await journal.add_join_token(b"b", 100.0)
        assert await journal.spend_join_token(b"x", 1.0) == "unknown"
        assert await journal.spend_join_token(b"b", 100.0) == "expired"
        outcomes = await asyncio.gather(*(journal.spend_join_token(b"a", 99.0) for _ in range(8)))
        assert sorted(outcomes) == ["ok"] + ["used"] * 7

    async def test_numbers_never_repeat(self, journal: Journal) -> None:
        assert [await journal.next_lease() for _ in range(3)] == [1, 2, 3]
        sessions = await asyncio.gather(*(journal.next_session() for _ in range(SESSION_BLOCK + 10)))
        assert len(set(sessions)) == SESSION_BLOCK + 10
        assert min(sessions) >= 1

    async def test_a_request_comes_back_as_it_was(self, journal: Journal) -> None:
        await journal.record_request(entry())
        await journal.append_tokens(RequestId("r1"), 0, tokens(0, 3))
        held = await journal.request(RequestId("r1"))
        assert held is not None
        assert held.entry == entry()
        assert held.tokens == tuple(tokens(0, 3))
        assert (held.finish_reason, held.error) == ("", "")
        assert await journal.request(RequestId("r2")) is None

    async def test_appending_what_is_there_changes_nothing(self, journal: Journal) -> None:
        await journal.record_request(entry())
        await journal.append_tokens(RequestId("r1"), 0, tokens(0, 3))
        other = [Token(1, 999), Token(2, 999), *tokens(3, 1)]
        await journal.append_tokens(RequestId("r1"), 1, other)
        held = await journal.request(RequestId("r1"))
        assert held is not None
        assert held.tokens == tuple(tokens(0, 4))

    async def test_appending_never_leaves_a_hole(self, journal: Journal) -> None:
        await journal.record_request(entry())
        with pytest.raises(UsageError, match="can't follow"):
            await journal.append_tokens(RequestId("r1"), 1, tokens(1, 1))
        with pytest.raises(UsageError, match="no request"):
            await journal.append_tokens(RequestId("r2"), 0, tokens(0, 1))

    async def test_the_first_finish_counts_and_nothing_follows_it(self, journal: Journal) -> None:
        await journal.record_request(entry())
        await journal.finish_request(RequestId("r1"), "error", "the tail died")
        await journal.finish_request(RequestId("r1"), "stop")
        await journal.append_tokens(RequestId("r1"), 0, tokens(0, 1))
        held = await journal.request(RequestId("r1"))
        assert held is not None
        assert (held.finish_reason, held.error, held.tokens) == ("error", "the tail died", ())

    async def test_a_request_without_tokens_may_be_accepted_again_for_other_classes(
        self, journal: Journal
    ) -> None:
        await journal.record_request(entry())
        await journal.rebind_request(RequestId("r1"), ("d1", "d2"))
        found = await journal.request(RequestId("r1"))
        assert found is not None
        assert found.entry == replace(entry(), class_map=("d1", "d2"))
        await journal.append_tokens(RequestId("r1"), 0, tokens(0, 1))
        with pytest.raises(UsageError, match="has 1 tokens"):
            await journal.rebind_request(RequestId("r1"), ("e1", "e2"))
        with pytest.raises(UsageError):
            await journal.rebind_request(RequestId("nobody"), ())

    async def test_finished_requests_are_forgotten_by_age_and_number_and_unfinished_ones_never(
        self, journal: Journal
    ) -> None:
        for number in range(8):
            name = RequestId(f"r{number}")
            await journal.record_request(replace(entry(name), accepted_at=float(number)))
            await journal.append_tokens(name, 0, tokens(0, 2))
            if number != 1:
                await journal.finish_request(name, "stop")
        assert await journal.prune_requests(accepted_before=3.0, keep=100) == 2  # 0 and 2; 1 is not finished
        assert await journal.prune_requests(accepted_before=3.0, keep=100) == 0
        assert await journal.prune_requests(accepted_before=0.0, keep=2, limit=1) == 1  # 3
        assert await journal.prune_requests(accepted_before=0.0, keep=2) == 2  # 4, 5
        left = [n for n in range(8) if await journal.request(RequestId(f"r{n}")) is not None]
        assert left == [1, 6, 7]
        assert [len(held.tokens) for held in await journal.unfinished()] == [2]

    async def test_unfinished_requests_come_in_the_order_they_were_accepted(self, journal: Journal) -> None:
        for name in ("b", "a", "c"):
            await journal.record_request(entry(name))
        await journal.finish_request(RequestId("a"), "stop")
        assert [held.entry.request for held in await journal.unfinished()] == ["b", "c"]

    async def test_a_request_id_is_used_once(self, journal: Journal) -> None:
        await journal.record_request(entry())
        with pytest.raises(UsageError, match="already"):
            await journal.record_request(entry())

    async def test_one_refused_entry_does_not_undo_its_neighbours(self, journal: Journal) -> None:
        results = await asyncio.gather(
            journal.record_request(entry("a")),
            journal.record_request(entry("a")),
            journal.record_request(entry("b")),
            return_exceptions=True,
        )
        assert [isinstance(result, UsageError) for result in results] == [False, True, False]
        assert [held.entry.request for held in await journal.unfinished()] == ["a", "b"]

    async def test_secrets_are_replaced(self, journal: Journal) -> None:
        assert await journal.secret("key") is None
        await journal.set_secret("key", b"\x00one")
        await journal.set_secret("key", b"two")
        assert await journal.secret("key") == b"two"

    async def test_closing_ends_it_and_is_idempotent(self, journal: Journal) -> None:
        await journal.close()
        await journal.close()
        with pytest.raises(UsageError, match="closed"):
            await journal.next_lease()


async def test_closing_waits_for_what_is_queued(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    await journal.record_request(entry())
    pending = [
        asyncio.ensure_future(journal.append_tokens(RequestId("r1"), i, tokens(i, 1))) for i in range(50)
    ]
    await asyncio.sleep(0)  # let them queue
    await journal.close()
    await asyncio.gather(*pending)
    reopened = SqliteJournal(tmp_path / "journal.db")
    held = await reopened.request(RequestId("r1"))
    await reopened.close()
    assert held is not None
    assert len(held.tokens) == 50


async def test_a_cancelled_caller_leaves_its_entry_and_the_journal_whole(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    caller = asyncio.ensure_future(journal.record_request(entry()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert [held.entry.request for held in await journal.unfinished()] == ["r1"]
    await journal.close()


async def test_callers_share_commits() -> None:
    commits: list[str] = []

    def open_connection() -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute("CREATE TABLE t (x)")
        connection.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )
        return connection

    writer = GroupCommitWriter(open_connection, on_rollback=lambda: None)

    async def one(x: int) -> int:
        return await writer.run(
            lambda c: int(c.execute("INSERT INTO t VALUES (?) RETURNING x", (x,)).fetchone()[0])
        )

    assert await asyncio.gather(*(one(x) for x in range(500))) == list(range(500))
    await writer.close()
    assert len(commits) < 250


async def test_a_commit_that_fails_fails_all_its_callers_and_the_next_one_goes_on(tmp_path: Path) -> None:
    rolled_back: list[bool] = []
    connections: list[sqlite3.Connection] = []

    def open_connection() -> sqlite3.Connection:
        connection = sqlite3.connect(tmp_path / "x.db", timeout=0, isolation_level=None)
        connection.execute("CREATE TABLE t (x)")
        connections.append(connection)
        return connection

    writer = GroupCommitWriter(open_connection, on_rollback=lambda: rolled_back.append(True))
    blocker = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(EdgeRuntimeError, match="could not be written"):
        await writer.run(lambda c: c.execute("INSERT INTO t VALUES (1)").rowcount)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert await writer.run(lambda c: c.execute("INSERT INTO t VALUES (2)").rowcount) == 1
    assert rolled_back == [True]
    await writer.close()


async def test_numbers_and_devices_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    first = SqliteJournal(path)
    lease, session = await first.next_lease(), await first.next_session()
    await first.record_device(device())
    await first.close()
    second = SqliteJournal(path)
    assert await second.next_lease() > lease
    assert await second.next_session() > session
    assert await second.devices() == [device()]
    await second.close()
    assert path.stat().st_mode & 0o077 == 0


_CHILD = """
import asyncio, sys
from pathlib import Path
from coordinator.journal.sqlite import SqliteJournal
from coordinator.journal.base import RequestEntry
from edge_runtime.core import RequestId, SamplingParams, Token

async def stream(journal, name):
    request = RequestId(name)
    await journal.record_request(RequestEntry(request, "t", "b", (), (1,), SamplingParams(), 9, (), False, 0.0))
    for i in range(1_000_000):
        await journal.append_tokens(request, i, [Token(i, 7 * i)])
        sys.stdout.write(f"{name} {i}\\n")
        sys.stdout.flush()

async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await asyncio.gather(*(stream(journal, f"r{n}") for n in range(4)))

asyncio.run(main())
"""


async def test_every_acknowledged_token_is_there_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    child = subprocess.Popen(  # noqa: ASYNC220 (nothing else runs on this loop)
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(path)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    acknowledged: dict[str, int] = {}
    with child.stdout as lines:
        for count, line in enumerate(lines):
            name, item = line.decode().split()
            acknowledged[name] = int(item)
            if count == 400:
                os.kill(child.pid, signal.SIGKILL)  # lines still in the pipe were acknowledged, too: read on
    child.wait()
    journal = SqliteJournal(path)
    assert len(acknowledged) == 4
    for name, last in acknowledged.items():
        held = await journal.request(RequestId(name))
        assert held is not None
        assert len(held.tokens) > last
        assert [token.id for token in held.tokens] == [7 * i for i in range(len(held.tokens))]
    await journal.close()


async def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(ConfigError, match="damaged") as caught:
        SqliteJournal(path)
    assert caught.value.hint
    assert str(path) in caught.value.message


async def test_a_damaged_page_is_found_at_open(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    for i in range(30):
        await journal.record_request(entry(f"r{i}" + "x" * 500))
    await journal.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        SqliteJournal(path)


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await SqliteJournal(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(ConfigError, match="schema") as caught:
        SqliteJournal(path)
    assert "update" in caught.value.hint


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be opened"):
        SqliteJournal(tmp_path / "file" / "journal.db")
