"""The tables of the SQLite journal, and how a database is opened.

Knows: pragmas, the schema and its version, and what a damaged or newer file is answered with. Does not know: what
the rows are for.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from edge_runtime.errors import ConfigError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_SECONDS = 5.0

_TABLES = """
CREATE TABLE devices (
  device_id TEXT PRIMARY KEY, name TEXT NOT NULL, public_key BLOB NOT NULL,
  paired_at REAL NOT NULL, revoked INTEGER NOT NULL
) STRICT;
CREATE TABLE join_tokens (
  hash BLOB PRIMARY KEY, expires_at REAL NOT NULL, spent INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE requests (
  number INTEGER PRIMARY KEY, request TEXT NOT NULL UNIQUE, entry TEXT NOT NULL,
  finish_reason TEXT NOT NULL DEFAULT '', error TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX unfinished_requests ON requests (number) WHERE finish_reason = '';
CREATE TABLE tokens (
  request INTEGER NOT NULL, item INTEGER NOT NULL, position INTEGER NOT NULL, id INTEGER NOT NULL,
  logprob TEXT NOT NULL, finish TEXT NOT NULL, PRIMARY KEY (request, item)
) STRICT, WITHOUT ROWID;
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create. Raises ConfigError for what can't be opened, is damaged, or is of a newer version."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Secrets lie in it: only its owner may read it, from the first byte on.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as problem:
        raise ConfigError(
            f"{path}: the journal can't be opened: {problem.strerror}",
            hint="choose a state directory this user may write to",
        ) from None
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
    try:
        _prepare(connection, path)
    except sqlite3.DatabaseError as problem:
        connection.close()
        raise _explained(problem, path) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: the journal has schema {version}, this version knows {SCHEMA_VERSION}",
            hint="update edge-runtime, or choose another state directory",
            code="journal_newer",
        )
    if version == 0:
        connection.executescript(f"BEGIN IMMEDIATE;{_TABLES}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        return
    finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        raise sqlite3.DatabaseError(finding)


def _explained(problem: sqlite3.DatabaseError, path: Path) -> ConfigError:
    if isinstance(problem, sqlite3.OperationalError):
        return ConfigError(
            f"{path}: the journal can't be opened: {problem}",
            hint="is another coordinator using this state directory?",
            code="journal_busy",
        )
    return ConfigError(
        f"{path}: the journal is damaged: {problem}",
        hint="restore it from a copy, or move it away and pair the devices again",
        code="journal_damaged",
    )
