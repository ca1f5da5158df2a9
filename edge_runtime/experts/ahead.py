"""Experts of the next layer, read before anybody has asked for them: only while nobody waits for flash.

They go through the lanes, behind everything else, each checked like any other read. The slot of one that is on its way
is held, and nobody finds the expert there before it has come and is right: `settle` comes before its layer looks. What
a layer asks for goes first: guesses that are not among it are given up when flash is needed for something else.

Knows: slots, the lanes. Does not know: who guessed, batches, whether it is worth it. One compute thread uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from queue import SimpleQueue

from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.pool import Pool
from edge_runtime.experts.reader import Arrival, ExpertReader, ReadBatch
from edge_runtime.experts.slot_table import ABSENT
from edge_runtime.experts.statistics import CacheStatistics

MOST_FLYING = 4
FREE_SHARE = 2  # at least one slot in so many is left to the layer that runs now


@dataclass(slots=True)
class _Flight:
    pool: Pool
    layer: ExpertLayer
    expert: int
    slot: int
    batch: ReadBatch  # of its own, so that it can be given up alone
    missing: int  # planes on their way
    failed: bool = False

    @property
    def key(self) -> int:
        return self.pool.first_key[self.layer.layer] + self.expert


class ReadAhead:
    def __init__(self, reader: ExpertReader, statistics: CacheStatistics) -> None:
        self._reader = reader
        self._statistics = statistics
        self._arrived: SimpleQueue[Arrival] = SimpleQueue()
        self._flying: dict[tuple[int, int], _Flight] = {}
        self._fresh: dict[int, set[int]] = {}  # by layer: came, and was not asked for yet

    @property
    def is_busy(self) -> bool:
        """Whether `settle` has anything to do."""
        return bool(self._flying or self._fresh)

    @property
    def flying(self) -> Collection[tuple[int, int]]:
        """(layer, expert)."""
        return self._flying.keys()

    def begin(
        self,
        pool: Pool,
        layer: ExpertLayer,
        experts: Iterable[int],
        step: int,
        uses: int,
        check: Callable[[], None],
    ) -> None:
        """Read those that are not here, the first ones first. `uses`: slots that the layer that runs now may need.
        `check` makes checks that were put off: of what is in slots that are taken now."""
        is_checked = False
        for expert in experts:
            key = pool.first_key[layer.layer] + expert
            if len(self._flying) >= min(MOST_FLYING, pool.table.slots // FREE_SHARE - uses):
                return
            if pool.table.slot(key) != ABSENT:
                continue
            if not is_checked:
                check()
                is_checked = True
            slot = pool.table.admit(key, step, 0)
            if slot == ABSENT:
                return
            pool.table.hold(slot)
            pool.table.unpin(key)
            flight = _Flight(pool, layer, expert, slot, ReadBatch(arrived=self._arrived), layer.planes)
            self._flying[layer.layer, expert] = flight
            planes = range(layer.planes)
            self._reader.submit(flight.batch, layer, expert, pool.arena.slot(slot), planes, later=True)

    def settle(self, layer: int, asked: Collection[int], *, is_missed: bool) -> None:
        """Before a layer looks for the experts `asked`: those of them that were on their way have come, or are gone.
        `is_missed`: it will read others, so whatever else is on its way is given up."""
        self.take_arrived()
        if is_missed:
            self._give_up(
                flight for (own, e), flight in self._flying.items() if own != layer or e not in asked
            )
        while any((layer, expert) in self._flying for expert in asked):
            self._land(self._arrived.get())
        fresh = self._fresh.pop(layer, None)
        if fresh:
            self._statistics.count_ahead(layer, used=len(fresh.intersection(asked)))

    def take_arrived(self) -> None:
        while not self._arrived.empty():
            self._land(self._arrived.get())

    def stop(self) -> None:
        """Nothing is on its way afterwards, and no slot held."""
        self._give_up(self._flying.values())
        while self._flying:
            self._land(self._arrived.get())

    def cancel(self) -> None:
        """What has not begun is not read: the cache is closed."""
        self._give_up(self._flying.values())

    @staticmethod
    def _give_up(flights: Iterable[_Flight]) -> None:
        for flight in flights:
            flight.batch.cancelled = True

    def _land(self, arrival: Arrival) -> None:
        flight = self._flying[arrival.layer, arrival.expert]
        flight.missing -= 1
        flight.failed = flight.failed or arrival.problem is not None
        if flight.missing:
            return
        del self._flying[arrival.layer, arrival.expert]
        flight.pool.table.release(flight.slot)
        if flight.failed:  # nobody asked: who does will read it again, and hear what is wrong
            flight.pool.table.forget(flight.key)
            return
        self._fresh.setdefault(arrival.layer, set()).add(arrival.expert)
        self._statistics.count_ahead(arrival.layer, read=1, read_bytes=sum(flight.layer.plane_bytes))
