"""Which page of KV memory belongs to which session: the accounting, without the memory.

A session reserves pages for all the rows it may ever hold when it opens, and takes them one by one as rows arrive,
so an open session can never run out half-way. Full pages may have names (`prefix_cache`): a session that opens with
the same names takes them over, and they are counted, not copied. Named pages that nobody uses are free to whoever
needs one.
Knows: sessions, rows, reservations, the free list, who uses which page. Does not know: bytes, layers, or what is in a
page.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edge_runtime.core import SessionId
from edge_runtime.engine.prefix_cache import PrefixCache
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
    names: Sequence[bytes] = ()  # page i gets names[i] once it is full
    ids: list[int] = field(default_factory=list)  # of the rows that were computed, replaced ones past `rows`
    settled: int = 0  # leading pages whose names were dealt with


@dataclass(frozen=True, slots=True)
class Moves:
    """What has to happen to the memory, in this order, before rows are written."""

    clear: tuple[int, ...] = ()  # pages that hold what nobody may see any more
    copy: tuple[tuple[int, int], ...] = ()  # (from, to): rows of a shared page that stays as it is


class PageTable:
    """Block tables of all open sessions over `num_pages` pages. Lower free pages go out first: memory stays dense."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages must be 0 or more, not {num_pages}")
        self.num_pages = num_pages
        self.prefixes = PrefixCache()
        self._free = list(range(num_pages))  # a heap
        self._users: Counter[int] = Counter()  # page -> sessions that have it in their table
        self._sessions: dict[SessionId, SessionPages] = {}
        self._reserved_pages = 0

    # ------------------------------------------------------------ how full

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

    @property
    def used_pages(self) -> int:
        """That hold something: of sessions, each counted once, and those that rest."""
        return self.num_pages - len(self._free)

    @property
    def spare_pages(self) -> int:
        """That no session uses."""
        return len(self._free) + len(self.prefixes.resting)

    def is_used(self, page: int) -> bool:
        return self._users[page] > 0

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

    # ------------------------------------------------------------ sessions

    def open(self, session: SessionId, max_rows: int, names: Sequence[bytes] = ()) -> list[int]:
        """Reserve room for `max_rows` rows, or raise CapacityError with what is wanted and what is left.

        Returns the ids of the rows it has already: those of the leading pages of `names` that are here.
        """
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
        held = self._sessions[session] = SessionPages(max_rows, names=tuple(names))
        for name in names[: (max_rows - 1) // PAGE_TOKENS]:
            page = self.prefixes.find(name)
            if page is None:
                break
            self._use(page)
            held.pages.append(page)
            held.ids.extend(self.prefixes.ids(page))
        held.settled = len(held.pages)
        held.rows = len(held.ids)
        return list(held.ids)

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

    def append(self, session: SessionId, base_row: int, count: int) -> Moves:
        """Hold rows base_row .. base_row + count - 1 as the last ones, in pages that no other session sees."""
        self.check_append(session, base_row, count)
        cleared = self.truncate(session, base_row) if base_row < self.get(session).rows else []
        held = self._sessions[session]
        copies = self._own_last_page(held, cleared)
        held.rows = base_row + count
        while len(held.pages) < pages_for(held.rows):
            held.pages.append(self._take(cleared))
        return Moves(tuple(cleared), copies)

    def _own_last_page(self, held: SessionPages, cleared: list[int]) -> tuple[tuple[int, int], ...]:
        """Rows will be written into a page that has a name: it loses it, or is copied where others use it."""
        if held.rows % PAGE_TOKENS == 0 or held.pages[-1] not in self.prefixes:
            return ()
        shared = held.pages[-1]
        if self._users[shared] == 1:
            self.prefixes.forget(shared)
            return ()
        held.pages[-1] = self._take(cleared)
        self._users[shared] -= 1  # others have it: it is neither free nor at rest
        return ((shared, held.pages[-1]),)

    def ran(self, session: SessionId, base_row: int, ids: Sequence[int]) -> list[int]:
        """Rows were computed, in every layer: pages that are full of such rows get their names.

        Returns pages given up because another session's page of that name holds the same.
        """
        held = self.get(session)
        if base_row > len(held.ids):
            return []  # rows below were appended without being told of: their ids are not known
        before = held.ids[base_row : base_row + len(ids)]
        changed = next(
            (row for row, (old, new) in enumerate(zip(before, ids, strict=False)) if old != new), None
        )
        if changed is not None:  # what the names were given for is not what is there now
            held.names = held.names[: (base_row + changed) // PAGE_TOKENS]
        held.ids[base_row : base_row + len(ids)] = ids
        return self._settle(held)

    def keep(
        self, session: SessionId, first_page: int, names: Sequence[bytes], ids: Sequence[int]
    ) -> list[int]:
        """Name full pages from `first_page` on, as far as they hold rows of exactly these ids. Returns as `ran`."""
        held = self.get(session)
        freed: list[int] = []
        for index, name in enumerate(names):
            start, page = index * PAGE_TOKENS, first_page + index
            rows = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            wanted = list(ids[start : start + PAGE_TOKENS])
            if rows.stop > held.rows or len(wanted) < PAGE_TOKENS or held.ids[rows] != wanted:
                break
            freed += self._name(held, page, name)
        return freed

    def truncate(self, session: SessionId, rows: int) -> list[int]:
        """Forget rows from `rows` on; the reservation stays. Returns the pages freed."""
        held = self.get(session)
        held.rows = min(held.rows, rows)
        keep = pages_for(held.rows)
        dropped = held.pages[keep:]
        del held.pages[keep:]
        held.settled = min(held.settled, held.rows // PAGE_TOKENS)
        return self._leave(dropped)

    def close(self, session: SessionId) -> list[int]:
        """Forget the session and its reservation. Unknown sessions are ignored. Returns the pages freed."""
        if session not in self._sessions:
            return []
        freed = self.truncate(session, 0)
        self._reserved_pages -= pages_for(self._sessions.pop(session).max_rows)
        return freed

    # ------------------------------------------------------------ pages of nobody

    def borrow(self, count: int) -> tuple[list[int], list[int]]:
        """(pages for the caller alone until `give_back`, those of them to be cleared first). Raises CapacityError."""
        if count > self.spare_pages:
            raise CapacityError(
                f"{count} pages of KV memory are wanted for side rows, {self.spare_pages} are left",
                hint="run the chain alone",
            )
        cleared: list[int] = []
        return [self._take(cleared) for _ in range(count)], cleared

    def give_back(self, pages: Sequence[int]) -> None:
        self._leave(pages)

    # ------------------------------------------------------------ pages at rest

    def grow_older(self) -> list[int]:
        """Free the pages that have rested since before the last call. Returns them."""
        return self._freed(self.prefixes.grow_older())

    def give_up_resting(self) -> list[int]:
        return self._freed(self.prefixes.give_up_all())

    # ------------------------------------------------------------ one page

    def _take(self, cleared: list[int]) -> int:
        """A page for one session alone. There always is one: sessions use no more pages than they reserved."""
        if self._free:
            page = heapq.heappop(self._free)
        else:
            resting = self.prefixes.give_up_one()
            assert resting is not None, "more pages are in use than were reserved"
            page = resting
            cleared.append(page)
        self._users[page] = 1
        return page

    def _use(self, page: int) -> None:
        self.prefixes.wake(page)
        self._users[page] += 1

    def _leave(self, pages: Sequence[int]) -> list[int]:
        """The last pages rest first, so that they are given up before those they continue."""
        freed: list[int] = []
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self.prefixes:
                self.prefixes.rest(page)
            else:
                freed.append(page)
        return self._freed(freed)

    def _freed(self, pages: Iterable[int]) -> list[int]:
        freed = list(pages)
        for page in freed:
            heapq.heappush(self._free, page)
        return freed

    def _settle(self, held: SessionPages) -> list[int]:
        """Names for the full pages that were not looked at yet."""
        freed: list[int] = []
        full = min(held.rows, len(held.ids)) // PAGE_TOKENS
        while held.settled < min(full, len(held.names)):
            freed += self._name(held, held.settled, held.names[held.settled])
            held.settled += 1
        return freed

    def _name(self, held: SessionPages, index: int, name: bytes) -> list[int]:
        page = held.pages[index]
        if page in self.prefixes:
            return []
        known = self.prefixes.find(name)
        if known is None:
            rows = held.ids[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            self.prefixes.name(page, name, tuple(rows))
            return []
        self._use(known)  # the same rows, bit for bit: two of them need not be kept
        held.pages[index] = known
        return self._leave([page])
