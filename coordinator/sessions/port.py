"""What a running session needs of the rest of the coordinator.

Knows: the interface. Does not know: links, devices, the cluster's state; `runtime` provides it, tests fake it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.sessions.draft_ledger import DraftCounts
from edge_runtime.core import RequestId, Token
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.protocol.messages import (
    Draft,
    Feed,
    Gap,
    OpenSession,
    Pooled,
    RowsHeld,
    SessionFailed,
    Tokens,
)

# ---------------------------------------------------------------- into a session


@dataclass(frozen=True, slots=True)
class Open:
    """Start, or start again, on the pipeline of this lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class PipelineLost:
    """The pipeline of this lease is over. An `Open` follows, or a `Fail`."""

    lease: int


@dataclass(frozen=True, slots=True)
class Reopen:
    """Ask again: close on the pipeline of this lease, and open anew."""

    lease: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rebind:
    """The classes it was accepted for are gone. Where nobody saw a token yet it goes on with these; else it fails."""

    class_map: tuple[str, ...]
    error: EdgeRuntimeError


@dataclass(frozen=True, slots=True)
class Fail:
    error: EdgeRuntimeError


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody listens any more."""


@dataclass(frozen=True, slots=True, eq=False)
class PooledVector:
    message: Pooled
    vector: NDArray[np.float32]  # [E]


FromStages = Tokens | RowsHeld | PooledVector | Gap | SessionFailed
Inbound = Open | PipelineLost | Reopen | Rebind | Fail | Cancel | FromStages

# ---------------------------------------------------------------- out of a session


@dataclass(frozen=True, slots=True)
class KeptPages:
    """Pages after those named when the session was opened, and the ids of the rows they must hold."""

    names: bytes = b""
    ids: tuple[int, ...] = ()


NOTHING_KEPT = KeptPages()


class SessionPort(Protocol):
    @property
    def clock(self) -> Callable[[], float]: ...

    async def next_session(self) -> int:
        """A session number that was never used."""
        ...

    def start(self, key: str, opening: OpenSession, feed: Feed) -> None:
        """Send both to the first stage, in this order; route what comes back to the session `key`."""
        ...

    def draft(self, draft: Draft) -> None:
        """Guesses for the first stage of the draft's lease."""
        ...

    def draft_load(self, lease: int) -> float:
        """How loaded the pipeline is for those who draft, 0 .. 1."""
        ...

    def drafted(self, source: str, counts: DraftCounts) -> None:
        """So much came of drafts since it was told last."""
        ...

    def close(self, session: int, lease: int, kept: KeptPages) -> None:
        """Tell every stage to free the session, but for `kept`; nothing of it is routed any more."""
        ...

    def page_names(self, lease: int, tenant: str, ids: Sequence[int], *, after: bytes = b"") -> bytes:
        """Names of the full pages of `ids`, the first of which follows the page named `after`.

        b"" where the rows of this pipeline are no other session's.
        """
        ...

    def broke(self, key: str, lease: int, reason: str, *, progressed: bool) -> None:
        """Ask for another `Open` (or a `Fail`, after too many)."""
        ...

    def patience_seconds(self, lease: int, rows: int) -> float:
        """How long nothing may come, by measured speeds, where `rows` rows are to be prefilled first."""
        ...

    def stalled(self, key: str, lease: int, since: float, *, progressed: bool) -> None:
        """Nothing came since then. If a stage is stuck, an answer follows."""
        ...

    def faulty_tail(self, key: str, lease: int, reason: str) -> None:
        """The tail sent what no tail may send."""
        ...

    def committed(self, lease: int, count: int, seconds: float) -> None:
        """`count` tokens were journalled, `seconds` after the ones before (0: the first of a stretch)."""
        ...


class RequestJournal(Protocol):
    """The part of the journal that a generation writes to."""

    async def append_tokens(
        self, request: RequestId, first_index: int, tokens: tuple[Token, ...]
    ) -> None: ...

    async def finish_request(self, request: RequestId, finish_reason: str, error: str = "") -> None: ...
    async def rebind_request(self, request: RequestId, class_map: tuple[str, ...]) -> None: ...
