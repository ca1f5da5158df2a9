"""Files read past the page cache: how to open them, and whether what comes is what is there.

Knows: O_DIRECT and its rules (offset, length and memory on page boundaries). Does not know: experts, threads.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
_F_NOCACHE = 48  # macOS: the nearest it has to O_DIRECT

ReadInto = Callable[[int, memoryview, int], int]  # (descriptor, target, offset) -> bytes read


def read_into(descriptor: int, target: memoryview, offset_bytes: int) -> int:
    return os.preadv(descriptor, [target], offset_bytes)


def read_fully(descriptor: int, target: memoryview, offset_bytes: int, read: ReadInto = read_into) -> None:
    """Raises OSError, also where the file ends too early."""
    done = 0
    while done < len(target):
        count = read(descriptor, target[done:], offset_bytes + done)
        if count <= 0:
            raise OSError(f"the file ends at byte {offset_bytes + done}")
        done += count


def open_for_reading(path: Path, *, direct: bool) -> int:
    """Raises OSError: also where the file system has no direct reads."""
    if not direct:
        return os.open(path, os.O_RDONLY)
    if hasattr(os, "O_DIRECT"):
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def direct_works(paths: Sequence[Path]) -> bool:
    """Whether a direct read of each file's first page gives what a buffered one gives; a warning says why not."""
    page = mmap.mmap(-1, PAGE_BYTES)
    for path in paths:
        why = _why_not_direct(path, memoryview(page))
        if why:
            log.warning("%s: %s; experts are read through the page cache", path, why)
            return False
    return True


def _why_not_direct(path: Path, page: memoryview) -> str:
    try:
        descriptor = open_for_reading(path, direct=True)
        try:
            read_fully(descriptor, page, 0)
        finally:
            os.close(descriptor)
    except OSError as problem:
        return f"no direct reads here ({problem})"
    with path.open("rb") as file:
        return "" if file.read(PAGE_BYTES) == page else "direct reads give other bytes than buffered ones"
