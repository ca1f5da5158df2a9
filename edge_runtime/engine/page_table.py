"""Which page of KV memory belongs to which session: the accounting, without the memory.

A session reserves pages for all the rows it may ever hold when it opens, and takes them one by one as rows arrive,
so an open session can never run out half-way.
Knows: sessions, rows, reservations, the free list. Does not know: bytes, layers, or what is in a page.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from edge_runtime.core import SessionId
from edge_runtime.errors import CapacityError, EngineError

PAGE_TOKENS = 32


def pages_for(rows: int) -> int:
    return -(-rows // PAGE_TOKENS)


@dataclass(slots=True)
class SessionPages:
    """One session's block table: its rows 32 i .. 32 i + 31 lie in page `pages[i]`."""

    max_rows: int
    rows: int = 0
    pages: list[int] = field(default_factory=list)


class PageTable:
    """Block tables of all open sessions over `num_pages` pages. Lower free pages go out first: memory stays dense."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages must be 0 or more, not {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap
        self._sessions: dict[SessionId, SessionPages] = {}
        self._reserved_pages = 0

    @property
    def capacity_tokens(self) -> int:
        return self.num_pages * PAGE_TOKENS

    @property
    def reserved_tokens(self) -> int:
        """Promised to open sessions, in whole pages: capacity minus this is what `open` can still give."""
        return self._reserved_pages * PAGE_TOKENS

    @property
    def held_tokens(self) -> int:
        return sum(held.rows for held in self._sessions.values())

    def sessions(self) -> tuple[SessionId, ...]:
        return tuple(self._sessions)

    def get(self, session: SessionId) -> SessionPages:
        held = self._sessions.get(session)
        if held is None:
            raise EngineError(
                f"session {session} is not open on this stage", hint="open the session before sending rows"
            )
        return held

    def __contains__(self, session: SessionId) -> bool:
        return session in self._sessions

    def open(self, session: SessionId, max_rows: int) -> None:
        """Reserve room for `max_rows` rows, or raise CapacityError with what is wanted and what is left."""
        if session in self._sessions:
            raise EngineError(f"session {session} is already open on this stage")
        if max_rows < 1:
            raise EngineError(f"session {session} asks for {max_rows} rows; it needs at least 1")
        wanted = pages_for(max_rows)
        left = self.num_pages - self._reserved_pages
        if wanted > left:
            raise CapacityError(
                f"session {session} wants KV memory for {max_rows} tokens; "
                f"{left * PAGE_TOKENS} of {self.capacity_tokens} are left",
                hint="shorten the request, wait for others to end, or give this device more memory",
            )
        self._reserved_pages += wanted
        self._sessions[session] = SessionPages(max_rows)

    def check_append(self, session: SessionId, base_row: int, count: int) -> None:
        """Raise what `append` would raise, and change nothing."""
        held = self.get(session)
        if not 0 <= base_row <= held.rows:
            raise EngineError(
                f"session {session} got rows from {base_row} on, but holds {held.rows}",
                hint=f"feed it again from row {held.rows} on",
            )
        if base_row + count > held.max_rows:
            raise CapacityError(
                f"session {session} reserved {held.max_rows} rows and would hold {base_row + count}",
                hint="open the session with more rows",
            )

    def append(self, session: SessionId, base_row: int, count: int) -> list[int]:
        """Hold rows base_row .. base_row + count - 1 as the last ones. Returns pages freed by rows dropped for it."""
        self.check_append(session, base_row, count)
        freed = self.truncate(session, base_row) if base_row < self.get(session).rows else []
        held = self._sessions[session]
        held.rows = base_row + count
        while len(held.pages) < pages_for(held.rows):
            held.pages.append(heapq.heappop(self._free))
        return [page for page in freed if page not in held.pages]

    def truncate(self, session: SessionId, rows: int) -> list[int]:
        """Forget rows from `rows` on; the reservation stays. Returns the pages freed."""
        held = self.get(session)
        held.rows = min(held.rows, rows)
        keep = pages_for(held.rows)
        freed = held.pages[keep:]
        del held.pages[keep:]
        for page in freed:
            heapq.heappush(self._free, page)
        return freed

    def close(self, session: SessionId) -> list[int]:
        """Forget the session and its reservation. Unknown sessions are ignored. Returns the pages freed."""
        if session not in self._sessions:
            return []
        freed = self.truncate(session, 0)
        self._reserved_pages -= pages_for(self._sessions.pop(session).max_rows)
        return freed
