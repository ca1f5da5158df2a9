"""How fast this device's flash gives experts, and with how many reads at a time.

Two questions. How many bytes a second does it give at most: whole experts, several at a time, not looked at.
With how many lanes are a token's missing experts there soonest, read in pieces and checked as the cache does it. Where
lanes are as good as more of them, more are taken: beside computing, one that waits for a core keeps flash waiting.

Knows: reading at random, and the clock. Does not know: caches, or what the numbers are used for.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import direct_works, open_for_reading, read_fully
from edge_runtime.experts.reader import ExpertReader, ReadBatch

LANES = (1, 2, 4)
AS_GOOD = 1.05  # times the shortest time
DEFAULT_SECONDS = 0.3
MISSING = 2  # experts of a layer's row that are not in memory, typically
TARGETS = 4  # slots that one reader reads into in turn: more than a huge page


@dataclass(frozen=True, slots=True)
class FlashSpeed:
    """Of single experts read at random. `direct`: past the page cache, as the device does it."""

    bytes_per_second: float
    lanes: int  # with which a few experts that are missing together are there soonest
    direct: bool


def measure_flash(
    layers: Sequence[ExpertLayer],
    *,
    budget_seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> FlashSpeed:
    """Both questions and each number of lanes get an equal share of the time. Raises OSError."""
    direct = direct_works(sorted({layer.path for layer in layers}))
    share_seconds = budget_seconds / (2 * len(LANES))
    speed = max(_speed(layers, lanes, direct, share_seconds, seed, clock) for lanes in LANES)
    taken = {lanes: _missing_seconds(layers, lanes, direct, share_seconds, seed, clock) for lanes in LANES}
    soonest = min(taken.values())
    best_lanes = max(lanes for lanes, seconds in taken.items() if seconds <= soonest * AS_GOOD)
    return FlashSpeed(speed, best_lanes, direct)


def _missing_seconds(
    layers: Sequence[ExpertLayer],
    lanes: int,
    direct: bool,
    seconds: float,
    seed: int,
    clock: Callable[[], float],
) -> float:
    """Until `MISSING` experts asked for together are there, checked: the median. At least one try."""
    chance = random.Random(seed)
    stride_bytes = max(layer.stride_bytes for layer in layers)
    arena = Arena(MISSING, stride_bytes)
    slots = [arena.slot(slot) for slot in range(MISSING)]
    reader = ExpertReader(layers, lanes=lanes, direct=direct)
    try:
        taken: list[float] = []
        begin = clock()
        while not taken or clock() - begin < seconds:
            batch, start = ReadBatch(), clock()
            flying = 0
            for slot in slots:
                layer = chance.choice(layers)
                reader.submit(batch, layer, chance.randrange(layer.experts), slot, range(layer.planes))
                flying += layer.planes
            for _ in range(flying):
                batch.arrived.get()  # one that is damaged is timed, too: whoever uses it will mend it
            taken.append(clock() - start)
        return statistics.median(taken)
    finally:
        reader.close()


def _speed(
    layers: Sequence[ExpertLayer],
    lanes: int,
    direct: bool,
    seconds: float,
    seed: int,
    clock: Callable[[], float],
) -> float:
    readers = [_Reader(layers, direct, seed * len(LANES) + lane) for lane in range(lanes)]
    try:
        begin = clock()
        threads = [
            threading.Thread(target=reader.read_until, args=(begin + seconds, clock)) for reader in readers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = clock() - begin
    finally:
        for reader in readers:
            reader.close()
    for reader in readers:
        if reader.problem is not None:
            raise reader.problem
    return sum(reader.done_bytes for reader in readers) / max(taken, 1e-9)


class _Reader:
    def __init__(self, layers: Sequence[ExpertLayer], direct: bool, seed: int) -> None:
        self.done_bytes = 0
        self.problem: OSError | None = None
        self._layers = layers
        self._chance = random.Random(seed)
        self._arena = Arena(TARGETS, max(layer.stride_bytes for layer in layers))
        self._files = {layer.path: open_for_reading(layer.path, direct=direct) for layer in layers}

    def read_until(self, deadline: float, clock: Callable[[], float]) -> None:
        """At least one expert."""
        try:
            while True:
                layer = self._chance.choice(self._layers)
                offset_bytes = layer.offset(self._chance.randrange(layer.experts))
                target = self._arena.slot(self._chance.randrange(TARGETS))[: layer.stride_bytes]
                read_fully(self._files[layer.path], target, offset_bytes)
                self.done_bytes += layer.stride_bytes
                if clock() >= deadline:
                    return
        except OSError as problem:
            self.problem = problem

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
