"""One thread that owns an SQLite connection and commits in groups.

Everything queued while a commit runs goes into the next one, so that a hundred callers pay for one fsync. A caller's
future is resolved after the commit that holds its work. Work that fails is undone alone; its neighbours are kept.

Knows: threads, transactions, futures. Does not know: tables.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_runtime.errors import EdgeRuntimeError, UsageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_GROUP = 1024  # jobs of one commit: bounds how long the first of them waits


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class GroupCommitWriter:
    """`await writer.run(work)` calls `work(connection)` on the thread and returns its result once it is durable."""

    def __init__(
        self, open_connection: Callable[[], sqlite3.Connection], *, on_rollback: Callable[[], None]
    ) -> None:
        """Opens the connection on the new thread and waits for it: an error there is raised here."""
        self._open_connection = open_connection
        self._on_rollback = on_rollback  # called on the thread when a whole group could not be committed
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._open_error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="journal-writer", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            raise self._open_error

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._closed:
            raise UsageError("the journal is closed", hint="the coordinator is shutting down")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._queue.put(_Job(work, future, loop))
        # Shielded: a caller that is cancelled must not look as if its work had been, too.
        return await asyncio.shield(future)

    async def close(self) -> None:
        """Commit what is queued, then end the thread. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    # ------------------------------------------------------------ on the thread

    def _main(self) -> None:
        try:
            connection = self._open_connection()
        except BaseException as problem:  # handed to the thread that waits in __init__
            self._open_error = problem
            return
        finally:
            self._opened.set()
        try:
            while self._commit_group(connection):
                pass
        finally:
            connection.close()

    def _commit_group(self, connection: sqlite3.Connection) -> bool:
        """Wait for work, commit all there is. False once the queue has ended."""
        group: list[_Job] = []
        item = self._queue.get()
        while item is not None:
            group.append(item)
            if len(group) == MAX_GROUP:
                break
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        if group:
            self._run_group(connection, group)
        return item is not None

    def _run_group(self, connection: sqlite3.Connection, group: list[_Job]) -> None:
        outcomes: list[tuple[_Job, Any, BaseException | None]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in group:
                outcomes.append((job, *_attempt(connection, job)))
            connection.execute("COMMIT")
        except sqlite3.Error as problem:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._on_rollback()
            logger.error("a commit of %d entries failed: %s", len(group), problem)
            failure = _storage_error(problem)
            outcomes = [(job, None, failure) for job in group]
        _resolve(outcomes)


def _attempt(connection: sqlite3.Connection, job: _Job) -> tuple[Any, BaseException | None]:
    connection.execute("SAVEPOINT job")
    try:
        value = job.work(connection)
    except (EdgeRuntimeError, sqlite3.IntegrityError, ValueError, OverflowError) as problem:
        connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")
        return None, problem
    connection.execute("RELEASE job")
    return value, None


def _storage_error(problem: sqlite3.Error) -> EdgeRuntimeError:
    return EdgeRuntimeError(
        f"the journal could not be written: {problem}",
        hint="check the free space and the permissions of the state directory",
        code="journal_write",
    )


def _resolve(outcomes: list[tuple[_Job, Any, BaseException | None]]) -> None:
    """One wake-up per event loop, however many callers it has."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any, BaseException | None]]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome[0].loop, []).append(outcome)
    for loop, theirs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, theirs)
        except RuntimeError:  # that loop has ended: nobody waits any more
            logger.debug("%d journal callers have gone", len(theirs))


def _settle(outcomes: list[tuple[_Job, Any, BaseException | None]]) -> None:
    for job, value, problem in outcomes:
        if job.future.done():
            continue
        if problem is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(problem)
