"""What a command may take of this machine where nobody said: cores, memory; and sizes as arguments.

Knows: what the system says of itself. Does not know: what the memory is for.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError

from edge_runtime import config

FALLBACK_BYTES = 1 << 30


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def free_memory_bytes() -> int | None:
    """None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def share_of_free_memory(share: float) -> int:
    """FALLBACK_BYTES where the system does not say what is free."""
    free_bytes = free_memory_bytes()
    return FALLBACK_BYTES if free_bytes is None else int(free_bytes * share)


def size(text: str) -> int:
    """An argument such as 512MiB, in bytes. Raises ArgumentTypeError."""
    try:
        return config.parse_size(text)
    except ValueError as problem:
        raise ArgumentTypeError(str(problem)) from None
