"""Planes that make experts in memory more exact, read while nobody waits for a read.

Knows: pools, and when a plane may be written. Does not know: batches. One compute thread uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from queue import Empty

from edge_runtime.experts.pool import Pool
from edge_runtime.experts.reader import Arrival, ExpertReader, ReadBatch
from edge_runtime.experts.statistics import CacheStatistics

log = logging.getLogger(__name__)

# Begun after each step. What is under way keeps its slot, and flash and a core are busy with it.
STEP_BYTES = 64 << 20
SLOTS_SHARE = 4  # at most one in so many slots


class Upgrades:
    def __init__(self, pools: Collection[Pool], reader: ExpertReader, statistics: CacheStatistics) -> None:
        self._pools = [pool for pool in pools if pool.is_lossy]
        self._reader = reader
        self._statistics = statistics
        self._batch = ReadBatch()
        self._flying: dict[tuple[int, int], tuple[Pool, int]] = {}  # (layer, expert) -> where it goes

    @property
    def under_way(self) -> int:
        return len(self._flying)

    def begin(self) -> None:
        """Ask for more, the experts that are used most first."""
        for pool in self._pools:
            flying = sum(own is pool for own, _ in self._flying.values())
            most = min(STEP_BYTES // pool.arena.slot_bytes, pool.table.slots // SLOTS_SHARE) - flying
            for slot in pool.planes.next_upgrades(max(0, most)):
                layer, expert = pool.who(slot)
                pool.table.hold(slot)
                self._flying[layer.layer, expert] = pool, slot
                plane = pool.planes.here(slot)
                self._reader.submit(self._batch, layer, expert, pool.arena.slot(slot), (plane,), later=True)

    def take_arrived(self) -> None:
        """Use from now on what has come since."""
        while self._flying:
            try:
                arrival = self._batch.arrived.get_nowait()
            except Empty:
                return
            self._land(arrival)

    def wait(self) -> None:
        """Until all that was asked for has come."""
        while self._flying:
            self._land(self._batch.arrived.get())

    def cancel(self) -> None:
        """What is not begun is not read."""
        self._batch.cancelled = True

    def _land(self, arrival: Arrival) -> None:
        pool, slot = self._flying.pop((arrival.layer, arrival.expert))
        pool.table.release(slot)
        if arrival.problem is None:
            layer, _ = pool.who(slot)
            pool.planes.arrived(slot, arrival.plane + 1)
            self._statistics.count_upgrade(arrival.layer, layer.plane_bytes[arrival.plane])
            return
        pool.planes.gave_up(slot)
        if not self._batch.cancelled:
            log.warning(
                "expert %d of layer %d stays at fewer bits: %s",
                arrival.expert,
                arrival.layer,
                arrival.problem,
            )
