"""KV memory: committed on first use, really returned on release, zeroed for the next session."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.core import SessionId
from edge_runtime.engine.kv_cache import KvCache, KvShape
from edge_runtime.errors import CapacityError

MIB = 1 << 20
SHAPE = KvShape(layers=4, kv_heads=4, head_dim=64)  # 256 KiB a page


def rss_bytes() -> int:
    resident = Path("/proc/self/statm").read_text().split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def fill(cache: KvCache, session: SessionId) -> None:
    for page in cache.table.get(session).pages:
        cache.pool[page] = 1.0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_committed_on_use_and_returned_on_drop() -> None:
    before = rss_bytes()
    cache = KvCache(SHAPE, num_pages=4096)  # 1 GiB of address space
    cache.open(SessionId(1), 32 * 256)
    cache.open(SessionId(2), 32 * 256)
    assert rss_bytes() - before < 8 * MIB

    for session in (SessionId(1), SessionId(2)):
        cache.append(session, 0, 32 * 256)
        fill(cache, session)
    assert rss_bytes() - before > 120 * MIB
    assert cache.committed_bytes == 128 * MIB

    cache.drop(SessionId(1))
    assert 56 * MIB < rss_bytes() - before < 76 * MIB
    cache.truncate(SessionId(2), 32 * 16)
    assert rss_bytes() - before < 16 * MIB
    assert np.all(cache.pool[cache.table.get(SessionId(2)).pages] == 1.0)
    cache.close()
    assert cache.committed_bytes == 0


def test_a_freed_page_holds_nothing_of_its_last_session() -> None:
    cache = KvCache(SHAPE, num_pages=2)
    cache.open(SessionId(1), 64)
    cache.append(SessionId(1), 0, 64)
    fill(cache, SessionId(1))
    cache.drop(SessionId(1))
    cache.open(SessionId(2), 64)
    cache.append(SessionId(2), 0, 64)
    assert not cache.pool.any()


def test_replacing_rows_keeps_the_pages_below() -> None:
    cache = KvCache(SHAPE, num_pages=4)
    cache.open(SessionId(1), 128)
    cache.append(SessionId(1), 0, 100)
    fill(cache, SessionId(1))
    cache.append(SessionId(1), 40, 10)  # a new parent: rows 40.. are replaced
    pages = cache.table.get(SessionId(1)).pages
    assert len(pages) == 2
    assert np.all(cache.pool[pages] == 1.0)
    assert cache.table.get(SessionId(1)).rows == 50


def test_block_tables_are_padded() -> None:
    cache = KvCache(SHAPE, num_pages=8)
    for session, rows in ((SessionId(1), 70), (SessionId(2), 1)):
        cache.open(session, rows)
        cache.append(session, 0, rows)
    tables = cache.block_tables([SessionId(2), SessionId(1)])
    assert tables.shape == (2, 3)
    assert list(tables[0]) == [3, 0, 0]
    assert list(tables[1]) == [0, 1, 2]


def test_an_empty_cache_refuses_every_session() -> None:
    cache = KvCache(SHAPE, SHAPE.pages_in(1000))
    with pytest.raises(CapacityError, match="0 of 0"):
        cache.open(SessionId(1), 1)
