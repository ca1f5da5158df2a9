"""What every session on a pipeline goes through: opened, broken, opened again, ended.

One task runs one session, so that all its steps are in one order; messages reach it through its inbox.

Knows: leases, session numbers, retries and silence. Does not know: what the rows mean (`generation`, `embedding`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from coordinator.sessions.port import (
    NOTHING_KEPT,
    Cancel,
    Fail,
    Inbound,
    KeptPages,
    Open,
    PipelineLost,
    PooledVector,
    Rebind,
    Reopen,
    SessionPort,
)
from edge_runtime.errors import EdgeRuntimeError, RequestFailed
from edge_runtime.protocol.messages import Feed, Gap, OpenSession, RowsHeld, SessionFailed, Tokens

# Failures that another try would only repeat, and what to do about them.
HOPELESS = {"wire_overflow": "start the coordinator with --wire fp32"}


class LiveSession(ABC):
    """`run` returns when the session ended, one way or another."""

    def __init__(self, key: str, port: SessionPort, *, stall_seconds: float) -> None:
        self.key = key
        self.rows = 0  # what it may grow to
        self._port = port
        self._stall_seconds = stall_seconds
        self._inbox: asyncio.Queue[Inbound] = asyncio.Queue()
        self._lease = 0  # open under it; 0: not open
        self._number = 0
        self._forced_rows = 0
        self._held_rows = 0  # of the forced ones: as far as the tail has come
        self._progressed = False
        self._openings = 0
        self._quiet_since = 0.0  # opened then, or brought something
        self._looked_at = 0.0  # when somebody was last told that it is quiet
        self.ended = False

    @property
    def lease(self) -> int:
        """Of the pipeline it is on; 0: on none."""
        return self._lease

    @property
    def is_open(self) -> bool:
        return self._lease != 0

    @property
    def has_progressed(self) -> bool:
        """Something came since it was opened last."""
        return self._progressed

    @property
    def was_opened(self) -> bool:
        return self._openings > 0

    def deliver(self, message: Inbound) -> None:
        if not self.ended:
            self._inbox.put_nowait(message)

    async def run(self) -> None:
        """Raises only what is a bug; the session is closed on the pipeline in any case."""
        try:
            while not self.ended:
                await self._handle(await self._next())
        except Exception:
            self._on_crashed()
            raise
        finally:
            self.ended = True
            self._close()
            self._on_ended()

    async def _next(self) -> Inbound:
        if not self.is_open:
            return await self._inbox.get()  # the cluster's own patience ends this: it sends Open or Fail
        while True:
            patience_seconds, now = self._patience_seconds(), self._port.clock()
            rows = 0 if self._progressed else self._forced_rows
            look_at = self._looked_at + self._port.patience_seconds(self._lease, rows)
            give_up_at = self._quiet_since + patience_seconds
            if now >= give_up_at:
                reason = f"nothing came from the pipeline for {patience_seconds:.0f} s"
                return SessionFailed(self._number, self._lease, "stalled", reason)
            if now >= look_at:
                self._looked_at = now
                self._port.stalled(self.key, self._lease, self._quiet_since, progressed=self._progressed)
                continue
            try:
                async with asyncio.timeout(min(look_at, give_up_at) - now):
                    return await self._inbox.get()
            except TimeoutError:
                continue

    def _brought(self) -> None:
        """The pipeline got this session on. Late and repeated messages do not count: they would hide a stall."""
        self._progressed = True
        self._is_alive()

    def _is_alive(self) -> None:
        self._quiet_since = self._looked_at = self._port.clock()

    async def _handle(self, message: Inbound) -> None:
        match message:
            case Open():
                await self._open(message.lease)
            case PipelineLost():
                if message.lease == self._lease:
                    self._close()
            case Reopen():
                if message.lease == self._lease:
                    self._break(message.reason)
            case Rebind():
                await self._on_rebind(message)
            case Cancel():
                self.ended = await self._on_cancelled()
            case Fail():
                await self._on_failed(message.error)
                self.ended = True
            case Gap():
                if self._is_current(message):
                    self._break(f"a stage lost rows from {message.wanted_row} on")
            case SessionFailed():
                if self._is_current(message) and message.code in HOPELESS:
                    await self._on_failed(RequestFailed(message.reason, hint=HOPELESS[message.code]))
                    self.ended = True
                elif self._is_current(message):
                    self._break(message.reason)
            case Tokens():
                if self._is_current(message):
                    await self._on_tokens(message)
            case RowsHeld():
                if self._is_current(message):
                    self._on_rows_held(message)
            case PooledVector():
                if self._is_current(message.message):
                    await self._on_pooled(message)

    async def _open(self, lease: int) -> None:
        self._close()
        number = await self._port.next_session()
        opening, feed = self._opening(number, lease)
        self._lease, self._number, self._progressed = lease, number, False
        self._forced_rows, self._held_rows = opening.forced_rows, 0
        self._quiet_since = self._looked_at = self._port.clock()
        self._openings += 1
        self._port.start(self.key, opening, feed)

    def _close(self, kept: KeptPages = NOTHING_KEPT) -> None:
        if self.is_open:
            self._port.close(self._number, self._lease, kept)
            self._lease = 0

    def _on_rows_held(self, message: RowsHeld) -> None:
        """A long prompt is getting on."""
        if self._held_rows < message.rows <= self._forced_rows:
            self._held_rows = message.rows
            self._is_alive()

    def _break(self, reason: str) -> None:
        lease, progressed = self._lease, self._progressed
        self._close()
        self._port.broke(self.key, lease, reason, progressed=progressed)

    def _is_current(self, message: Tokens | Gap | SessionFailed | object) -> bool:
        return (
            self.is_open
            and getattr(message, "session", -1) == self._number
            and getattr(message, "lease", -1) == self._lease
        )

    @abstractmethod
    def _opening(self, number: int, lease: int) -> tuple[OpenSession, Feed]: ...

    @abstractmethod
    def _patience_seconds(self) -> float: ...

    @abstractmethod
    async def _on_rebind(self, message: Rebind) -> None: ...

    @abstractmethod
    async def _on_failed(self, error: EdgeRuntimeError) -> None: ...

    @abstractmethod
    async def _on_cancelled(self) -> bool:
        """Whether this ends it: somebody may have come back for it meanwhile."""

    @abstractmethod
    def _on_crashed(self) -> None:
        """A bug or a broken journal: whoever waits gets an error that says where to look."""

    @abstractmethod
    def _on_ended(self) -> None:
        """However `run` ended, nobody may be left waiting."""

    async def _on_tokens(self, message: Tokens) -> None:
        self._break("the tail sent tokens where none were asked for")

    async def _on_pooled(self, message: PooledVector) -> None:
        self._break("the tail sent a vector where none was asked for")


def crashed() -> RequestFailed:
    return RequestFailed(
        "the coordinator failed while serving this request", hint="its log says why; send the request again"
    )
