"""Two ways to have the missing experts of a layer: lanes, which are threads, and the kernel's own reading.

With lanes somebody else reads and hashes while the batch computes; they share its processors, and wake each other. With
`RingReads` the kernel reads and nobody waits for it: the batch's own threads hash what has come, between computing what
is here. The bytes, the checks, and what is done about wrong ones are the same.

Knows: slots, planes, digests. Does not know: which expert is wanted why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from edge_kernels import flash
from edge_kernels.experts import ExpertWeights
from numpy.typing import NDArray

from edge_runtime.bundle import hashing
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import open_for_reading
from edge_runtime.experts.reader import Arrival, Cancelled, ExpertReader, ReadBatch

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_LEFT_OUT = "the read was cancelled"


class Reads(Protocol):
    """One thread uses it."""

    def begin(
        self,
        batch: ReadBatch,
        layer: ExpertLayer,
        wanted: Sequence[tuple[int, int]],
        arena: Arena,
        planes: Iterable[int],
    ) -> None:
        """Read these planes of each (expert, slot); nobody else may touch the slots until they have arrived."""
        ...

    def arrivals(self, batch: ReadBatch, threads: int) -> tuple[list[Arrival], float]:
        """At least one, and all that are there already; and the seconds waited for flash. One must be on its way."""
        ...


class LaneReads:
    def __init__(self, reader: ExpertReader, clock: Callable[[], float] = time.perf_counter) -> None:
        self._reader = reader
        self.clock = clock

    def begin(
        self,
        batch: ReadBatch,
        layer: ExpertLayer,
        wanted: Sequence[tuple[int, int]],
        arena: Arena,
        planes: Iterable[int],
    ) -> None:
        for expert, slot in wanted:
            self._reader.submit(batch, layer, expert, arena.slot(slot), planes)

    def arrivals(self, batch: ReadBatch, threads: int) -> tuple[list[Arrival], float]:
        start = self.clock()
        found = [batch.arrived.get()]
        waited_seconds = self.clock() - start
        while not batch.arrived.empty():
            found.append(batch.arrived.get())
        return found, waited_seconds


class RingReads:
    """What is wrong goes to `reader`, which knows other ways to have it. Raises OSError, RuntimeError: use lanes."""

    def __init__(
        self, layers: Sequence[ExpertLayer], reader: ExpertReader, *, one_call: bool = False
    ) -> None:
        self.one_call = one_call
        self._reader = reader
        self._native = flash.FlashReads(hashing.EXPERT_PIECE_BYTES)
        self._flying: dict[int, tuple[ExpertLayer, int, int, memoryview]] = {}
        self._slots: list[tuple[int, int]] = []  # (key, slot) of what flies
        self._next_key = 0
        self._files: dict[str, int] = {}
        try:
            for layer in layers:
                if layer.slice not in self._files:
                    self._files[layer.slice] = open_for_reading(layer.path, direct=reader.direct)
        except OSError:
            self.close()
            raise

    def begin(
        self,
        batch: ReadBatch,
        layer: ExpertLayer,
        wanted: Sequence[tuple[int, int]],
        arena: Arena,
        planes: Iterable[int],
    ) -> None:
        file = self._files[layer.slice]
        planes = tuple(planes)
        parts = []
        for expert, slot in wanted:
            memory = arena.slot(slot)
            for plane in planes:
                start, end = layer.plane_start(plane), layer.plane_start(plane + 1)
                key = self._next_key = self._next_key + 1
                self._flying[key] = layer, expert, plane, memory[start:end]
                self._slots.append((key, slot))
                target = slot * arena.slot_bytes + start
                digest = layer.digest(expert, plane)
                parts.append(flash.Part(key, file, layer.offset(expert, plane), end - start, target, digest))
        if not batch.cancelled:  # else `arrivals` says so
            self._native.submit(arena.bytes, parts)

    def arrivals(self, batch: ReadBatch, threads: int) -> tuple[list[Arrival], float]:
        if batch.cancelled:
            return self._give_up(), 0.0
        before = self._native.waited_seconds
        landed = self._native.land(threads)
        waited_seconds = self._native.waited_seconds - before
        return self._arrivals(landed), waited_seconds

    def run_experts(
        self,
        batch: ReadBatch,
        x: Float32,
        ids: Int32,
        gates: Float32,
        weights: ExpertWeights,
        *,
        activation: str,
        threads: int,
    ) -> tuple[Float32 | None, list[Arrival], float]:
        """All that `begin` asked for arrives, and experts that are here are computed meanwhile. `ids` are slots.

        The result is None where something did not come right at once: its arrival says whether it is there now.
        """
        if batch.cancelled:
            return None, self._give_up(), 0.0
        before = self._native.waited_seconds
        result, landed = self._native.run_experts(
            self._slots, x, ids, gates, weights, activation=activation, threads=threads
        )
        waited_seconds = self._native.waited_seconds - before
        return result, self._arrivals(landed), waited_seconds

    @property
    def native(self) -> flash.FlashReads:
        """For who does all of a layer there; nothing that `begin` asked for may be on its way then."""
        return self._native

    def file(self, layer: ExpertLayer) -> int:
        """Descriptor of the layer's slice, open for as long as this is."""
        return self._files[layer.slice]

    def check(self, threads: int) -> list[tuple[int, flash.Landed]]:
        """Checks that were put off are made now: what is wrong, and who asked for it (`FlashLayer`)."""
        return self._native.check(threads)

    def cancel(self) -> None:
        """From any thread: what has not begun is not read."""
        self._native.cancel()

    def _arrivals(self, landed: Sequence[flash.Landed]) -> list[Arrival]:
        found = []
        for one in landed:
            layer, expert, plane, memory = self._flying.pop(one.key)
            problem: Exception | None
            if one.problem == flash.LEFT_OUT:
                problem = Cancelled(_LEFT_OUT)
            else:
                problem = self._reader.brought(layer, expert, plane, memory, one.problem)
            found.append(Arrival(layer.layer, expert, plane, problem))
        self._slots = (
            [(key, slot) for key, slot in self._slots if key in self._flying] if self._flying else []
        )
        return found

    def close(self) -> None:
        self._native.give_up()
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _give_up(self) -> list[Arrival]:
        self._native.give_up()
        left_out = Cancelled(_LEFT_OUT)
        found = [
            Arrival(layer.layer, expert, plane, left_out) for layer, expert, plane, _ in self._flying.values()
        ]
        self._flying.clear()
        self._slots = []
        return found


def kernel_reads(
    layers: Sequence[ExpertLayer], reader: ExpertReader, *, one_call: bool = False
) -> RingReads | None:
    """None where the kernel does not read on its own, or only through the page cache: lanes do it then."""
    if not reader.direct:
        return None
    try:
        return RingReads(layers, reader, one_call=one_call)
    except (OSError, RuntimeError):
        return None
