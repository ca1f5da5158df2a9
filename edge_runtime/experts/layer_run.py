"""One layer of one batch: experts that are in memory are computed while the others are read.

Outputs are kept apart and summed in gate-rank order at the end, so that a row has the bits it has when everything is in
memory, whatever was where.

Knows: slots, reads, kernels, and the order among them. Does not know: other layers, budgets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from edge_kernels.experts import combine, run_each, run_experts
from numpy.typing import NDArray

from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.pool import Pool
from edge_runtime.experts.reader import Arrival, ReadBatch
from edge_runtime.experts.reads import Reads, RingReads
from edge_runtime.experts.slot_table import ABSENT

ONE_CALL_USES = 4096  # rows times experts of a row: bounds what one call keeps apart

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class LayerRun:
    """x [R, hidden], ids and gates [R, top_k]. `look_up`, then one of `all_at_once` and `as_they_come`."""

    def __init__(
        self,
        reads: Reads,
        pool: Pool,
        layer: ExpertLayer,
        x: Float32,
        ids: Int32,
        gates: Float32,
        activation: str,
        threads: int,
    ) -> None:
        self.batch = ReadBatch()
        self.waited_seconds = 0.0
        self.fewer_bits = 0  # experts computed before all of their planes were there
        self._reads = reads
        self._table, self._arena, self._layer = pool.table, pool.arena, layer
        self._planes, self._start_planes, self._is_lossy = pool.planes, pool.start_planes, pool.is_lossy
        self._first_key = pool.first_key[layer.layer]
        self._weights = pool.weights[layer.layer]
        self._x, self._ids, self._gates = x, ids, gates
        self._activation, self._threads = activation, threads
        self._step = 0
        self._failed: set[int] = set()  # a plane of it could not be had
        self._uses: dict[int, list[int]] = {}  # expert -> places in ids, row after row
        for place, expert in enumerate(ids.reshape(-1).tolist()):
            self._uses.setdefault(expert, []).append(place)

    def look_up(self, step: int) -> tuple[list[int], list[int]]:
        """(experts that are here, and now pinned; experts to be read)."""
        self._step = step
        here: list[int] = []
        absent: list[int] = []
        for expert, places in self._uses.items():
            slot = self._table.use(self._first_key + expert, step, len(places))
            (absent if slot == ABSENT else here).append(expert)
            if self._is_lossy and slot != ABSENT:
                self._planes.used(slot, len(places))
        return here, absent

    def all_at_once(self) -> Float32:
        """Where all are here."""
        slots = {expert: self._slot(expert) for expert in self._uses}
        planes = {len(self._weights)}
        if self._is_lossy:
            planes = {self._planes.here(slot) for slot in slots.values()}
        try:
            if len(planes) > 1:
                outputs = self._new_outputs()
                self._compute(list(self._uses), outputs)
                return combine(outputs, self._gates)
            weights = self._weights[planes.pop() - 1]
            self._count_bits(weights is self._weights[-1], len(slots))
            return run_experts(
                self._x,
                self._slots(),
                self._gates,
                weights,
                activation=self._activation,
                threads=self._threads,
            )
        finally:
            self._table.unpin_all()

    def as_they_come(self, here: list[int], absent: list[int]) -> Float32:
        waiting = deque(absent)
        flying: dict[int, int] = {}
        try:
            self._submit(waiting, flying)
            reads = self._reads
            if isinstance(reads, RingReads) and reads.one_call and not waiting and self._are_alike(here):
                result = self._in_one_call(reads, flying)
                return self.all_at_once() if result is None else result
            outputs = self._new_outputs()
            self._compute(here, outputs)
            self._unpin(here)
            while flying or waiting:
                self._submit(waiting, flying)
                arrived = self._arrivals(flying)
                self._compute(arrived, outputs)
                self._unpin(arrived)
        finally:
            self._settle(flying)
            self._table.unpin_all()
        return combine(outputs, self._gates)

    def _are_alike(self, here: Sequence[int]) -> bool:
        """Whether all experts of the batch can be computed together, and they are few enough for its memory."""
        alike = not self._is_lossy or all(
            self._planes.here(self._slot(expert)) == self._start_planes for expert in here
        )
        return alike and self._ids.size <= ONE_CALL_USES

    def _in_one_call(self, reads: RingReads, flying: dict[int, int]) -> Float32 | None:
        """None where something had to be put right: all experts are here now."""
        slots = self._slots()
        weights = self._weights[self._start_planes - 1]
        result, arrivals, waited_seconds = reads.run_experts(
            self.batch,
            self._x,
            slots,
            self._gates,
            weights,
            activation=self._activation,
            threads=self._threads,
        )
        self.waited_seconds += waited_seconds
        for arrival in arrivals:
            self._land(arrival, flying)
        for arrival in arrivals:
            if arrival.problem is not None:
                raise arrival.problem
        if result is not None:
            self._count_bits(weights is self._weights[-1], len(self._uses))
        return result

    def _submit(self, waiting: deque[int], flying: dict[int, int]) -> None:
        """As many reads as there are slots that nobody needs now; the rest waits for those to be computed.

        `flying`: by expert, how many planes of it are still on their way.
        """
        wanted: list[tuple[int, int]] = []
        while waiting:
            expert = waiting[0]
            rows = len(self._uses[expert])
            slot = self._table.admit(self._first_key + expert, self._step, rows)
            if slot == ABSENT:
                break
            waiting.popleft()
            flying[expert] = self._start_planes
            self._planes.admitted(slot)
            self._planes.used(slot, rows)
            wanted.append((expert, slot))
        if wanted:
            self._reads.begin(self.batch, self._layer, wanted, self._arena, range(self._start_planes))

    def _arrivals(self, flying: dict[int, int]) -> list[int]:
        """At least one plane, and all that are there already; the experts that can be used now.

        Raises what a read failed with.
        """
        arrivals, waited_seconds = self._reads.arrivals(self.batch, self._threads)
        self.waited_seconds += waited_seconds
        usable = [arrival.expert for arrival in arrivals if self._land(arrival, flying)]
        for arrival in arrivals:
            if arrival.problem is not None:
                raise arrival.problem
        return usable

    def _land(self, arrival: Arrival, flying: dict[int, int]) -> bool:
        """Whether the expert can be used now."""
        expert = arrival.expert
        flying[expert] -= 1
        if arrival.problem is not None:
            self._failed.add(expert)
        if flying[expert]:
            return False
        del flying[expert]
        if expert in self._failed:
            self._table.forget(self._first_key + expert)
            return False
        self._planes.arrived(self._slot(expert), self._start_planes)
        return True

    def _settle(self, flying: dict[int, int]) -> None:
        """Nothing may be written into a slot any more once a batch has ended, however it did."""
        self.batch.cancelled = True
        while flying:
            for arrival in self._reads.arrivals(self.batch, self._threads)[0]:
                self._land(arrival, flying)

    def _compute(self, experts: Sequence[int], outputs: Float32) -> None:
        if not self._is_lossy:
            self._compute_alike(experts, outputs, len(self._weights))
            return
        by_planes: dict[int, list[int]] = {}
        for expert in experts:
            by_planes.setdefault(self._planes.here(self._slot(expert)), []).append(expert)
        for planes, alike in by_planes.items():
            self._compute_alike(alike, outputs, planes)

    def _compute_alike(self, experts: Sequence[int], outputs: Float32, planes: int) -> None:
        """Experts that have so many planes."""
        if not experts:
            return
        self._count_bits(planes == len(self._weights), len(experts))
        places = [place for expert in experts for place in self._uses[expert]]
        slots = [self._slot(expert) for expert in experts for _ in self._uses[expert]]
        rows = np.array(places) // self._ids.shape[1]
        outputs[places] = run_each(
            self._x[rows],
            np.array(slots, np.int32),
            self._weights[planes - 1],
            activation=self._activation,
            threads=self._threads,
        )

    def _count_bits(self, is_whole: bool, experts: int) -> None:
        self.fewer_bits += 0 if is_whole else experts

    def _new_outputs(self) -> Float32:
        return np.empty((self._ids.size, self._layer.hidden), np.float32)

    def _slots(self) -> Int32:
        """Of each id."""
        slots = [self._slot(expert) for expert in self._ids.reshape(-1).tolist()]
        return np.array(slots, np.int32).reshape(self._ids.shape)

    def _slot(self, expert: int) -> int:
        return self._table.slot(self._first_key + expert)

    def _unpin(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._table.unpin(self._first_key + expert)
