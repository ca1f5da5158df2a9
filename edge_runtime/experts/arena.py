"""Memory for experts: anonymous, page-aligned, cut into equal slots; nothing is allocated or freed while serving.

Knows: bytes and slots. Does not know: what is in them.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray


class Arena:
    """Slots are committed when they are first written."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(-1, slots * slot_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, no more
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @property
    def total_bytes(self) -> int:
        return self.slots * self.slot_bytes

    def slot(self, slot: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._view[start : start + self.slot_bytes]
