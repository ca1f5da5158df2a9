"""Pages that side rows use while a batch runs: each one sees its session's pages, and writes into pages of its own.

A side row gets a table like a session's. Full pages below the span's first row are the session's; from there on they
are borrowed: rows of the span that the side row continues are written there a second time, and then its own.

Knows: tables of pages, spans with side rows. Does not know: attention, whose KV memory it is, what becomes of results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edge_runtime.engine.base import Span
from edge_runtime.engine.kv_cache import KvPages
from edge_runtime.engine.page_table import PAGE_TOKENS

Tables = tuple[tuple[int, ...], ...]  # one of each side row, in the batch's order


def pages_wanted(spans: Sequence[Span]) -> int:
    """At most so many pages does a batch take, those that side rows borrow included."""
    chains = sum(len(span.ids) // PAGE_TOKENS + 2 for span in spans)
    return chains + sum(_borrowed(span, position) for span in spans for position in span.sides.positions())


@contextmanager
def side_pages(cache: KvPages, spans: Sequence[Span]) -> Iterator[Tables]:
    """For spans whose rows `cache` holds already. Raises CapacityError where too few pages are left."""
    places = [(span, position) for span in spans for position in span.sides.positions()]
    pages = cache.borrow(sum(_borrowed(span, position) for span, position in places))
    try:
        yield tuple(_tables(cache, places, iter(pages)))
    finally:
        cache.give_back_pages(pages)


def _borrowed(span: Span, position: int) -> int:
    return position // PAGE_TOKENS - span.base_row // PAGE_TOKENS + 1


def _tables(
    cache: KvPages, places: Sequence[tuple[Span, int]], pages: Iterator[int]
) -> Iterator[tuple[int, ...]]:
    for span, position in places:
        held = cache.table.get(span.session).pages
        whole, begun_rows = divmod(span.base_row, PAGE_TOKENS)
        own = [next(pages) for _ in range(_borrowed(span, position))]
        if begun_rows:
            cache.copy_rows(held[whole], own[0], begun_rows)
        yield (*held[:whole], *own)
