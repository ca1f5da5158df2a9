"""Memory for experts: anonymous, page-aligned, cut into equal slots; nothing is allocated or freed while serving.

All of it is there from the start: the kernel clears a page when it is first touched, which takes longer than reading an
expert into it does.

Knows: bytes and slots. Does not know: what is in them.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import numpy as np
from numpy.typing import NDArray

_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it
_STEP_BYTES = 8 << 20  # other threads get their turn in between


def _anonymous(size_bytes: int) -> mmap.mmap:
    """Private: Linux backs shared anonymous memory by a file system of its own, which usually has no huge pages."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size_bytes)


class Arena:
    """Where the system can't commit memory ahead, slots are committed when they are first written."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map = _anonymous(slots * slot_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, no more
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._commit()
        self._view = memoryview(self._map)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @property
    def total_bytes(self) -> int:
        return self.slots * self.slot_bytes

    def _commit(self) -> None:
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError):  # an older kernel, or memory is short: as it is written
            for start in range(0, self.total_bytes, _STEP_BYTES):
                self._map.madvise(_POPULATE_WRITE, start, min(_STEP_BYTES, self.total_bytes - start))

    def slot(self, slot: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._view[start : start + self.slot_bytes]
