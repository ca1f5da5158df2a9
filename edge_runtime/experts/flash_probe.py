"""How fast this device's flash gives experts, and with how many reads at a time.

Knows: reading at random, and the clock. Does not know: caches, or what the numbers are used for.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import direct_works, open_for_reading, read_fully

LANES = (1, 2, 4)
WORTH_A_LANE = 1.05  # another lane must bring this much: it costs a thread and memory traffic
DEFAULT_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class FlashSpeed:
    """Of single experts read at random. `direct`: past the page cache, as the device does it."""

    bytes_per_second: float
    lanes: int
    direct: bool


def measure_flash(
    layers: Sequence[ExpertLayer],
    *,
    budget_seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> FlashSpeed:
    """Each number of lanes gets an equal share of the time. Raises OSError."""
    direct = direct_works(sorted({layer.path for layer in layers}))
    best = FlashSpeed(0.0, 1, direct)
    for lanes in LANES:
        speed = _speed(layers, lanes, direct, budget_seconds / len(LANES), seed, clock)
        if speed > best.bytes_per_second * WORTH_A_LANE:
            best = FlashSpeed(speed, lanes, direct)
    return best


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
        self._target = memoryview(mmap.mmap(-1, max(layer.stride_bytes for layer in layers)))
        self._files = {layer.path: open_for_reading(layer.path, direct=direct) for layer in layers}

    def read_until(self, deadline: float, clock: Callable[[], float]) -> None:
        """At least one expert."""
        try:
            while True:
                layer = self._chance.choice(self._layers)
                offset_bytes = layer.offset(self._chance.randrange(layer.experts))
                target = self._target[: layer.stride_bytes]
                read_fully(self._files[layer.path], target, offset_bytes)
                self.done_bytes += layer.stride_bytes
                if clock() >= deadline:
                    return
        except OSError as problem:
            self.problem = problem

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
