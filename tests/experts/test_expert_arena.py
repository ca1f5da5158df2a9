"""Memory for experts is there from the start, and slots are apart."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from edge_runtime.experts.arena import Arena

STATM = Path("/proc/self/statm")
ROLLUP = Path("/proc/self/smaps_rollup")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SLOT_BYTES = 720 << 10


def _commits_ahead() -> bool:
    """Linux from 5.14 on."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except (AttributeError, OSError):
        return False
    return STATM.exists()


def _resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not _commits_ahead(), reason="this system commits memory when it is first written")
def test_all_of_it_is_resident_before_anything_is_written() -> None:
    before = _resident_bytes()
    arena = Arena(100, SLOT_BYTES)
    assert _resident_bytes() - before > 0.9 * arena.total_bytes


def _gives_huge_pages() -> bool:
    return HUGE.exists() and "[never]" not in HUGE.read_text()


def _huge_bytes() -> int:
    (line,) = (line for line in ROLLUP.read_text().splitlines() if line.startswith("AnonHugePages"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not _gives_huge_pages(), reason="this system has no huge pages for those who ask")
def test_it_lies_in_huge_pages() -> None:
    """Flash then writes an expert into one or two stretches instead of 180, and kernels miss fewer translations."""
    before = _huge_bytes()
    arena = Arena(100, SLOT_BYTES)
    assert _huge_bytes() - before > arena.total_bytes // 2


def test_slots_lie_side_by_side_in_what_the_kernels_read() -> None:
    arena = Arena(3, 4096)
    for slot in range(3):
        arena.slot(slot)[:] = bytes([slot + 1]) * 4096
    assert arena.bytes.reshape(3, 4096).tolist() == [[slot + 1] * 4096 for slot in range(3)]
    assert arena.total_bytes == 3 * 4096
