"""Keys and values of all sessions of a stage, in pages: `KvPages` in any memory, `KvCache` in this process's.

A `KvCache` is one reservation of virtual memory. Pages are committed by the operating system when first written, and
given back when nobody needs them, so resident memory follows what sessions hold and what is kept for the next one with
the same prefix.
Knows: the memory and its layout. Does not know: attention, spans, or where the budget comes from.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from edge_kernels.attention import SCALE_BYTES, Pool, quantized
from numpy.typing import NDArray

from edge_runtime.core import SessionId
from edge_runtime.engine.page_table import PAGE_TOKENS, PageTable

FLOAT_BYTES = 4
_NORESERVE = getattr(
    mmap, "MAP_NORESERVE", 0
)  # the budget is ours to keep; the kernel need not promise it twice


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token costs: `layers` of the stage, each with keys and values of kv_heads x head_dim numbers."""

    layers: int
    kv_heads: int
    head_dim: int
    format: str = "fp32"  # or int8: a byte a number, and a scale for each head

    @property
    def head_bytes(self) -> int:
        return self.head_dim + SCALE_BYTES if self.format == "int8" else self.head_dim * FLOAT_BYTES

    @property
    def page_bytes(self) -> int:
        return self.layers * 2 * PAGE_TOKENS * self.kv_heads * self.head_bytes

    def pages_in(self, budget_bytes: int) -> int:
        return max(budget_bytes, 0) // self.page_bytes


class KvPages(ABC):
    """Whose page is whose (`table`), over memory of any kind."""

    def __init__(self, shape: KvShape, num_pages: int) -> None:
        self.shape = shape
        self.table = PageTable(num_pages)
        self._stale: set[int] = set()  # were borrowed, and hold rows of nobody until a session ends

    @abstractmethod
    def write_pages(self, pages: Sequence[int], values: NDArray[np.float32]) -> None:
        """Values are [pages, layers, 2 (keys, values), 32, kv_heads, head_dim]."""

    @abstractmethod
    def copy_rows(self, source: int, target: int, rows: int = PAGE_TOKENS) -> None:
        """The first `rows` rows of a page, in every layer."""

    @abstractmethod
    def _release(self, pages: Iterable[int]) -> None:
        """What lies in these pages is not needed any more."""

    def open(self, session: SessionId, max_rows: int, names: Sequence[bytes] = ()) -> list[int]:
        """The ids of the rows that are here already, in pages of these names."""
        return self.table.open(session, max_rows, names)

    def append(self, session: SessionId, base_row: int, count: int) -> None:
        moves = self.table.append(session, base_row, count)
        self._release(moves.clear)
        for source, target in moves.copy:
            self.copy_rows(source, target)

    def ran(self, session: SessionId, base_row: int, ids: Sequence[int]) -> None:
        """The rows were computed in every layer: from now on others may use the pages they fill."""
        self._release(self.table.ran(session, base_row, ids))

    def keep(self, session: SessionId, first_page: int, names: Sequence[bytes], ids: Sequence[int]) -> None:
        self._release(self.table.keep(session, first_page, names, ids))

    def truncate(self, session: SessionId, rows: int) -> None:
        self._release(self.table.truncate(session, rows))

    def drop(self, session: SessionId) -> None:
        freed = self.table.close(session)
        stale, self._stale = self._stale.difference(freed), set()
        self._release([*freed, *(page for page in stale if not self.table.is_used(page))])

    def borrow(self, count: int) -> list[int]:
        """Pages for a single batch (`side_pages`). Raises CapacityError."""
        pages, cleared = self.table.borrow(count)
        self._release(cleared)
        return pages

    def give_back_pages(self, pages: Sequence[int]) -> None:
        """Their memory is kept until a session ends: the next batch borrows the same."""
        self.table.give_back(pages)
        self._stale.update(pages)

    def grow_older(self) -> None:
        """Give back what nobody has used since before the last call."""
        self._release(self.table.grow_older())

    def give_up_resting(self) -> None:
        self._release(self.table.give_up_resting())

    def block_tables(
        self, sessions: Sequence[SessionId], more: Sequence[Sequence[int]] = ()
    ) -> NDArray[np.int32]:
        """Of sessions, and `more` tables behind them: [tables, most pages of one of them], padded with 0."""
        pages = [*(self.table.get(session).pages for session in sessions), *more]
        tables = np.zeros((len(pages), max(map(len, pages), default=0)), np.int32)
        for row, held in zip(tables, pages, strict=True):
            row[: len(held)] = held
        return tables

    def close(self) -> None:
        """Drop everything. The memory goes when the last view of it does."""
        for session in self.table.sessions():
            self.drop(session)
        self.give_up_resting()


class KvCache(KvPages):
    """`pool` is f32[num_pages, layers, 2 (keys, values), 32, kv_heads, head_dim], or int8 with scales
    (`edge_kernels.attention`); `table` says whose page is whose."""

    def __init__(self, shape: KvShape, num_pages: int) -> None:
        super().__init__(shape, num_pages)
        # At least one page of address space, so that an empty cache is still an array.
        size_bytes = max(num_pages, 1) * shape.page_bytes
        self._memory = _reserve(size_bytes)
        dims = (max(num_pages, 1), shape.layers, 2, PAGE_TOKENS, shape.kv_heads)
        count = size_bytes // FLOAT_BYTES
        floats = np.frombuffer(self._memory, np.float32, count).reshape(*dims, -1)
        self.pool: Pool = floats.view(np.int8) if shape.format == "int8" else floats

    @property
    def committed_bytes(self) -> int:
        """Of pages that hold something: what this cache adds to the resident memory of the process."""
        return self.table.used_pages * self.shape.page_bytes

    def write_pages(self, pages: Sequence[int], values: NDArray[np.float32]) -> None:
        self.pool[list(pages)] = quantized(values) if self.shape.format == "int8" else values

    def copy_rows(self, source: int, target: int, rows: int = PAGE_TOKENS) -> None:
        self.pool[target, :, :, :rows] = self.pool[source, :, :, :rows]

    def _release(self, pages: Iterable[int]) -> None:
        """Give whole operating-system pages back; runs of neighbours go together. They read as zeros afterwards."""
        if not hasattr(self._memory, "madvise"):
            return  # no madvise on this system: freed pages stay resident, within the budget
        for first, last in _runs(sorted(pages)):
            start = -(-first * self.shape.page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (last + 1) * self.shape.page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _reserve(size_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would commit 2 MiB for one token
    return memory


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, last) runs without gaps."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], page)
        else:
            runs.append((page, page))
    return runs
