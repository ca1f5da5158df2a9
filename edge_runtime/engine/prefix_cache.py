"""Full pages that outlive their session: found again by name, kept until nobody comes back for them.

A name is given by the coordinator (docs/prefix_cache.md): equal names mean equal rows at equal positions, and nobody
without the tenant's key can make one. A page rests while no session uses it; the page that rested longest goes first,
and a session's last page rests longer than its first, so that a chain is never cut in its middle.

Knows: names, the ids of a named page's rows, who rests since when. Does not know: sessions, memory, clocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamedPage:
    name: bytes
    ids: tuple[int, ...]  # of its rows: whoever takes the page over must know them


class PrefixCache:
    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._named: dict[int, NamedPage] = {}
        self._resting: OrderedDict[int, int] = (
            OrderedDict()
        )  # page -> age when it began to rest, oldest first
        self._age = 0

    @property
    def resting(self) -> tuple[int, ...]:
        """Pages that no session uses, the next to go first."""
        return tuple(self._resting)

    @property
    def names(self) -> tuple[bytes, ...]:
        return tuple(self._page_of)

    def find(self, name: bytes) -> int | None:
        return self._page_of.get(name)

    def ids(self, page: int) -> tuple[int, ...]:
        return self._named[page].ids

    def __contains__(self, page: int) -> bool:
        return page in self._named

    def name(self, page: int, name: bytes, ids: tuple[int, ...]) -> None:
        """Of a page that a session uses. Neither the page nor the name may be taken."""
        assert page not in self._named
        assert name not in self._page_of
        self._page_of[name] = page
        self._named[page] = NamedPage(name, ids)

    def rest(self, page: int) -> None:
        self._resting[page] = self._age

    def wake(self, page: int) -> None:
        self._resting.pop(page, None)

    def forget(self, page: int) -> None:
        """Its rows are about to change, or it is given up."""
        del self._page_of[self._named.pop(page).name]
        self._resting.pop(page, None)

    def give_up_one(self) -> int | None:
        """The page that rested longest, now without a name; None where none rests."""
        if not self._resting:
            return None
        page = next(iter(self._resting))
        self.forget(page)
        return page

    def grow_older(self) -> list[int]:
        """Give up what has rested since before the last call: called every T seconds, pages rest T to 2 T."""
        old = [page for page, age in self._resting.items() if age < self._age]
        for page in old:
            self.forget(page)
        self._age += 1
        return old

    def give_up_all(self) -> list[int]:
        """Every page that rests."""
        pages = list(self._resting)
        for page in pages:
            self.forget(page)
        return pages
