"""Giving memory back to the system: mapped slices that were read, and what the allocator kept.

Knows: this process's pages. Does not know: what was in them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

from edge_runtime.bundle.bundle import Bundle


def forget_pages(bundle: Bundle, keys: Sequence[str]) -> None:
    """Take mapped slices out of this process's resident memory; they are read again where they are touched again."""
    for key in keys:
        owner = bundle.slice_bytes(key).obj
        if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
            owner.madvise(mmap.MADV_DONTNEED)


def return_free_memory() -> None:
    """Give back what the allocator kept while weights were repacked: up to half of their bytes (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
