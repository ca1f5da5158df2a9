"""One layer of a batch in one native call: looked up, read, checked and computed without Python in between.

What does not come right is put right here, and the layer computed again from memory, or, where checks are put off, the
whole step (`cache.run_checked`). `LayerRun` does the same in steps, for other policies, other ways to read and batches
of many rows; results and decisions are the same.

Knows: the native layer, and the reader that mends. Does not know: budgets, statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from edge_kernels.experts import run_experts
from edge_kernels.flash import CHECKED_FIRST, LEFT_OUT, Landed
from edge_kernels.flash_layer import ExpertSlots, FlashLayer, LayerOnFlash, LayerResult
from numpy.typing import NDArray

from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.layer_run import ONE_CALL_USES
from edge_runtime.experts.pool import Pool
from edge_runtime.experts.reader import Cancelled, ExpertReader
from edge_runtime.experts.reads import RingReads
from edge_runtime.experts.slot_table import ABSENT

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class StepOrder(NamedTuple):
    """How a layer of step `number` is to be run. `checks_later`: what is wrong goes to `NativeLayer.wrong`."""

    number: int
    activation: str
    threads: int
    checks_later: bool


class NativeLayer:
    """The first `planes` of an expert are read, and used: of all of them. x [R, hidden], ids and gates [R, top_k]."""

    def __init__(
        self, layer: ExpertLayer, pool: Pool, slots: ExpertSlots, reads: RingReads, reader: ExpertReader
    ) -> None:
        self._layer, self._pool, self._slots, self._reader = layer, pool, slots, reader
        self._planes = planes = pool.start_planes
        self.is_whole = not pool.is_lossy  # experts are complete before they are used
        self.miss_bytes = layer.plane_start(planes)  # what is read of an expert that is not in memory
        self._weights = pool.weights[layer.layer][planes - 1]
        self._first_key = pool.first_key[layer.layer]
        self._most_uses = min(ONE_CALL_USES, slots.slots)
        place = LayerOnFlash(
            reads.file(layer),
            layer.first_byte,
            self._first_key,
            layer.experts,
            layer.plane_bytes[:planes],
            [layer.digest(expert, plane) for expert in range(layer.experts) for plane in range(planes)],
        )
        self._native = FlashLayer(slots, reads.native, self._weights, place)

    def takes(self, ids: Int32) -> bool:
        """Whether so many uses go through one call."""
        return ids.size <= self._most_uses

    def run(self, x: Float32, ids: Int32, gates: Float32, order: StepOrder) -> tuple[Float32, LayerResult]:
        """Raises what a read failed with."""
        number, activation, threads, checks_later = order
        owner = self._layer.layer if checks_later else CHECKED_FIRST
        found = self._native.run(
            x, ids, gates, step=number, activation=activation, threads=threads, owner=owner
        )
        if found.rows is not None:
            if found.misses:
                self._reader.count(found.misses * self._planes, found.misses * self.miss_bytes)
            return found.rows, found
        try:
            self._put_right(found.landed)
            slots = [self._slots.slot(self._first_key + expert) for expert in ids.reshape(-1).tolist()]
            rows = run_experts(
                x,
                np.array(slots, np.int32).reshape(ids.shape),
                gates,
                self._weights,
                activation=activation,
                threads=threads,
            )
        finally:
            self._slots.unpin_all()
        return rows, found

    def wrong(self, landed: Sequence[Landed]) -> Exception | None:
        """Said after the rows were made. What is still in memory is right afterwards, or gone: the first problem."""
        here = [one for one in landed if self._slots.slot(self._key(one)) != ABSENT]
        try:
            self._put_right(here)
        except Exception as problem:
            return problem
        return None

    def _key(self, one: Landed) -> int:
        return self._first_key + one.key // self._planes

    def _put_right(self, landed: Sequence[Landed]) -> None:
        """What can't be had is not in memory afterwards. Raises the first problem."""
        layer = self._layer
        problems: dict[int, Exception] = {}
        for one in landed:
            expert, plane = divmod(one.key, self._planes)
            slot = self._pool.arena.slot(self._slots.slot(self._first_key + expert))
            memory = slot[layer.plane_start(plane) : layer.plane_start(plane + 1)]
            problem: Exception | None
            if one.problem == LEFT_OUT:
                problem = Cancelled("the read was cancelled")
            else:
                problem = self._reader.brought(layer, expert, plane, memory, one.problem)
            if problem is not None:
                problems.setdefault(expert, problem)
        for expert in problems:
            self._slots.forget(self._first_key + expert)
        for problem in problems.values():
            raise problem
