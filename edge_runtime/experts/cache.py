"""Experts of a stage behind a byte budget: some in memory, all on flash.

A batch's experts that are here are computed while the others are read; those are computed as they arrive. Outputs are
kept apart and summed in gate-rank order at the end, so that a row has the bits it has when everything is in memory,
whatever was where.

Knows: slots, reads, kernels, and the order among them. Does not know: routing, links, where the budget comes from.
One compute thread uses it; `cancel` may come from any.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from edge_kernels.experts import ExpertWeights, combine, run_each, run_experts
from numpy.typing import NDArray

from edge_runtime.errors import CapacityError, EngineError
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import ReadInto, read_into
from edge_runtime.experts.policies import DEFAULT_POLICY, POLICIES
from edge_runtime.experts.reader import DEFAULT_LANES, Arrival, ExpertReader, ReadBatch, Refetch
from edge_runtime.experts.slot_table import ABSENT, SlotTable
from edge_runtime.experts.statistics import CacheStatistics

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MIN_CYCLES = (
    1.0  # a cache below one token's experts can't hold on to anything: every read would be for nothing
)
FEW_CYCLES = 1.2


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """`budget_bytes` is for experts alone. `lanes`: reads in flight."""

    budget_bytes: int
    policy: str = DEFAULT_POLICY
    lanes: int = DEFAULT_LANES
    direct: bool = True
    refetch: Refetch | None = None
    read: ReadInto = read_into


class _Pool:
    """Layers whose experts have the same size share an arena."""

    def __init__(self, layers: Sequence[ExpertLayer], budget_bytes: int, policy: str) -> None:
        slot_bytes = layers[0].stride_bytes
        experts = sum(layer.experts for layer in layers)
        slots = min(experts, budget_bytes // slot_bytes)
        self.arena = Arena(slots, slot_bytes)
        self.table = SlotTable(slots, experts, POLICIES[policy](slots, experts))
        self.first_key: dict[int, int] = {}
        self.weights: dict[int, ExpertWeights] = {}
        key = 0
        for layer in layers:
            self.first_key[layer.layer] = key
            key += layer.experts
            self.weights[layer.layer] = ExpertWeights(
                buffer=self.arena.bytes,
                format=layer.format,
                num_experts=slots,
                hidden=layer.hidden,
                intermediate=layer.intermediate,
                stride_bytes=slot_bytes,
                offsets=layer.offsets,
            )


class ExpertCache:
    """Raises CapacityError below one token's cycle, BundleError where a store can't be read."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        options: CacheOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_budget(layers, options.budget_bytes)
        if options.policy not in POLICIES:
            raise EngineError(
                f"{options.policy!r} is not a cache policy", hint=f"choose one of {', '.join(POLICIES)}"
            )
        self.layers = {layer.layer: layer for layer in layers}
        self.budget_bytes = options.budget_bytes
        self.statistics = CacheStatistics(layer.layer for layer in layers)
        self._clock = clock
        self._pools = _make_pools(layers, options.budget_bytes, options.policy)
        self._reader = ExpertReader(
            layers,
            lanes=options.lanes,
            direct=options.direct,
            refetch=options.refetch,
            read=options.read,
        )
        self._step = 0
        self._last_layer = -1
        self._batch: ReadBatch | None = None

    def layer_of(self, tensor: str) -> int:
        """Number of the layer whose experts are `tensor`."""
        for layer in self.layers.values():
            if layer.tensor == tensor:
                return layer.layer
        raise EngineError(f"the expert cache of this stage does not know {tensor}")

    @property
    def arena_bytes(self) -> int:
        return sum(pool.arena.total_bytes for pool in set(self._pools.values()))

    @property
    def total_bytes(self) -> int:
        return sum(layer.total_bytes for layer in self.layers.values())

    @property
    def reader(self) -> ExpertReader:
        return self._reader

    def cancel(self) -> None:
        """Reads of the batch that runs now are given up, and the batch fails."""
        batch = self._batch
        if batch is not None:
            batch.cancelled = True

    def close(self) -> None:
        self.cancel()
        self._reader.close()
        self._pools = {}

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32:
        """What `run_experts` gives, bit for bit. Raises TamperedError (names layer and expert), EngineError."""
        if layer <= self._last_layer:
            self._step += 1
        self._last_layer = layer
        run = _LayerRun(self, self._pools[layer], self.layers[layer], x, ids, gates, activation, threads)
        here, absent = run.look_up(self._step)
        if not absent:
            result = run.all_at_once()
        else:
            self._batch = run.batch
            try:
                result = run.as_they_come(here, absent)
            finally:
                self._batch = None
        self.statistics.count(
            layer,
            hits=len(here),
            misses=len(absent),
            read_bytes=len(absent) * self.layers[layer].stride_bytes,
            waited_seconds=run.waited_seconds,
        )
        return result


class _LayerRun:
    """One layer of one batch."""

    def __init__(
        self,
        cache: ExpertCache,
        pool: _Pool,
        layer: ExpertLayer,
        x: Float32,
        ids: Int32,
        gates: Float32,
        activation: str,
        threads: int,
    ) -> None:
        self.batch = ReadBatch()
        self.waited_seconds = 0.0
        self._reader, self._clock = cache._reader, cache._clock
        self._table, self._arena, self._layer = pool.table, pool.arena, layer
        self._first_key = pool.first_key[layer.layer]
        self._weights = pool.weights[layer.layer]
        self._x, self._ids, self._gates = x, ids, gates
        self._activation, self._threads = activation, threads
        self._step = 0
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
        return here, absent

    def all_at_once(self) -> Float32:
        slots = {expert: self._table.slot(self._first_key + expert) for expert in self._uses}
        ids = np.array([slots[expert] for expert in self._ids.reshape(-1).tolist()], np.int32)
        try:
            return run_experts(
                self._x,
                ids.reshape(self._ids.shape),
                self._gates,
                self._weights,
                activation=self._activation,
                threads=self._threads,
            )
        finally:
            self._table.unpin_all()

    def as_they_come(self, here: list[int], absent: list[int]) -> Float32:
        outputs = np.empty((self._ids.size, self._layer.hidden), np.float32)
        waiting = deque(absent)
        flying: set[int] = set()
        try:
            self._submit(waiting, flying)
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

    def _submit(self, waiting: deque[int], flying: set[int]) -> None:
        """As many reads as there are slots that nobody needs now; the rest waits for those to be computed."""
        while waiting:
            expert = waiting[0]
            slot = self._table.admit(self._first_key + expert, self._step, len(self._uses[expert]))
            if slot == ABSENT:
                return
            waiting.popleft()
            flying.add(expert)
            self._reader.submit(self.batch, self._layer, expert, self._arena.slot(slot))

    def _arrivals(self, flying: set[int]) -> list[int]:
        """At least one expert, and all that are there already. Raises what a read failed with."""
        start = self._clock()
        arrivals = [self.batch.arrived.get()]
        self.waited_seconds += self._clock() - start
        while not self.batch.arrived.empty():
            arrivals.append(self.batch.arrived.get())
        self._land(arrivals, flying)
        for arrival in arrivals:
            if arrival.problem is not None:
                raise arrival.problem
        return [arrival.expert for arrival in arrivals]

    def _land(self, arrivals: list[Arrival], flying: set[int]) -> None:
        for arrival in arrivals:
            flying.discard(arrival.expert)
            if arrival.problem is not None:
                self._table.forget(self._first_key + arrival.expert)

    def _settle(self, flying: set[int]) -> None:
        """Nothing may be written into a slot any more once a batch has ended, however it did."""
        self.batch.cancelled = True
        while flying:
            arrival = self.batch.arrived.get()
            self._land([arrival], flying)

    def _compute(self, experts: Sequence[int], outputs: Float32) -> None:
        if not experts:
            return
        places = [place for expert in experts for place in self._uses[expert]]
        slots = [self._table.slot(self._first_key + expert) for expert in experts for _ in self._uses[expert]]
        rows = np.array(places) // self._ids.shape[1]
        outputs[places] = run_each(
            self._x[rows],
            np.array(slots, np.int32),
            self._weights,
            activation=self._activation,
            threads=self._threads,
        )

    def _unpin(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._table.unpin(self._first_key + expert)


def check_budget(layers: Sequence[ExpertLayer], budget_bytes: int) -> None:
    """Raises CapacityError below one token's cycle."""
    cycle_bytes = sum(layer.token_bytes for layer in layers)
    total_bytes = sum(layer.total_bytes for layer in layers)
    if budget_bytes < min(cycle_bytes, total_bytes):
        raise CapacityError(
            f"an expert cache of {_mib(budget_bytes)} is less than the {_mib(cycle_bytes)} of experts that one token "
            "uses: it would never hold what is asked for",
            hint="give the agent more --memory or --expert-cache, or this device fewer layers",
        )


def _make_pools(layers: Sequence[ExpertLayer], budget_bytes: int, policy: str) -> dict[int, _Pool]:
    """Each size of expert gets its share of the budget, and at least one token's experts."""
    by_size: dict[int, list[ExpertLayer]] = {}
    for layer in layers:
        by_size.setdefault(layer.stride_bytes, []).append(layer)
    total_bytes = sum(layer.total_bytes for layer in layers)
    cycle_bytes = sum(layer.token_bytes for layer in layers)
    spare_bytes = max(0, budget_bytes - cycle_bytes)
    pools: dict[int, _Pool] = {}
    for same in by_size.values():
        own_bytes = sum(layer.total_bytes for layer in same)
        own_cycle_bytes = sum(layer.token_bytes for layer in same)
        rest_bytes = max(1, total_bytes - cycle_bytes)
        share_bytes = own_cycle_bytes + spare_bytes * (own_bytes - own_cycle_bytes) // rest_bytes
        pool = _Pool(same, share_bytes, policy)
        pools.update((layer.layer, pool) for layer in same)
    return pools


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
