"""Layers in one native call, also where experts are used from their first plane on.

A native call knows one kind of experts. While none that a batch wants has got its second plane, that is the first plane
alone, as in a prompt after a cold start, which waits for nothing but reads; later `LayerRun` takes what is mixed.

Knows: the native layer, and how many planes are in which slot. Does not know: when second planes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from edge_kernels.flash import Landed
from edge_kernels.flash_layer import ExpertSlots, LayerResult
from numpy.typing import NDArray

from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.native_layer import NativeLayer, StepOrder
from edge_runtime.experts.pool import Pool
from edge_runtime.experts.reader import ExpertReader
from edge_runtime.experts.reads import RingReads
from edge_runtime.experts.slot_table import ABSENT
from edge_runtime.experts.upgrades import SLOTS_SHARE

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class FirstPlanes(NativeLayer):
    """Of a pool whose experts may be used before they are complete: reads and uses first planes."""

    def __init__(
        self, layer: ExpertLayer, pool: Pool, slots: ExpertSlots, reads: RingReads, reader: ExpertReader
    ) -> None:
        super().__init__(layer, pool, slots, reads, reader)
        # Slots whose second plane is on its way are not free for others.
        self._most_uses = min(self._most_uses, slots.slots - slots.slots // SLOTS_SHARE)

    def takes(self, ids: Int32) -> bool:
        """Whether so many uses go through one call, and nobody who is here has more than first planes."""
        if not super().takes(ids):
            return False
        planes = self._pool.planes
        return all(
            slot == ABSENT or planes.here(slot) == self._planes for slot in self._slots_of(np.unique(ids))
        )

    def run(self, x: Float32, ids: Int32, gates: Float32, order: StepOrder) -> tuple[Float32, LayerResult]:
        experts, rows = np.unique(ids, return_counts=True)
        before = self._slots_of(experts)
        try:
            return super().run(x, ids, gates, order)
        finally:
            after = self._slots_of(experts)
            came = [new for old, new in zip(before, after, strict=True) if old == ABSENT != new]
            self._pool.planes.came(came, self._planes)
            self._pool.planes.used_each(after, rows)

    def wrong(self, landed: Sequence[Landed]) -> Exception | None:
        slots = [self._slots.slot(self._key(one)) for one in landed]
        problem = super().wrong(landed)
        for one, slot in zip(landed, slots, strict=True):
            if slot != ABSENT and self._slots.slot(self._key(one)) == ABSENT:
                self._pool.planes.admitted(slot)  # nobody is there now
        return problem

    def _slots_of(self, experts: Iterable[int]) -> list[int]:
        return [self._slots.slot(self._first_key + int(expert)) for expert in experts]


def native_layers(
    layers: Sequence[ExpertLayer], pools: dict[int, Pool], reads: RingReads, reader: ExpertReader
) -> dict[int, NativeLayer]:
    """By number, of those that can run so."""
    found: dict[int, NativeLayer] = {}
    for layer in layers:
        pool = pools[layer.layer]
        if isinstance(pool.table, ExpertSlots):
            kind = FirstPlanes if pool.is_lossy else NativeLayer
            found[layer.layer] = kind(layer, pool, pool.table, reads, reader)
    return found
