"""Experts of a stage behind a byte budget: some in memory, all on flash.

Knows: layers, steps, and what is kept between them (`layer_run` has what happens in one). Does not know: routing,
links, where the budget comes from. One compute thread uses it; `cancel` may come from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from edge_kernels.flash import NO_TIMES, FlashTimes, Landed
from edge_kernels.linear import PackedMatrix
from numpy.typing import NDArray

from edge_runtime.errors import CapacityError, EngineError
from edge_runtime.experts.first_planes import native_layers
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import ReadInto, read_into
from edge_runtime.experts.layer_run import LayerRun
from edge_runtime.experts.native_layer import NativeLayer, StepOrder
from edge_runtime.experts.policies import DEFAULT_POLICY, POLICIES
from edge_runtime.experts.pool import Pool, make_pools
from edge_runtime.experts.prediction import Prediction, make_prediction
from edge_runtime.experts.prediction_setting import AUTO, PREDICTIONS
from edge_runtime.experts.reader import DEFAULT_LANES, Cancelled, ExpertReader, ReadBatch, Refetch
from edge_runtime.experts.reads import LaneReads, RingReads, kernel_reads
from edge_runtime.experts.slot_table import ABSENT
from edge_runtime.experts.start_bits import ALL_BITS, CHOICES
from edge_runtime.experts.statistics import CacheStatistics
from edge_runtime.experts.upgrades import Upgrades

T = TypeVar("T")
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """`budget_bytes` is for experts alone. `lanes`: reads in flight, where `ring` (the kernel reads on its own) is not
    to be had. `one_call`: a layer's hits, hashing and misses in one native call; False: a call for each step.

    `start_bits`: use bit-nested experts as soon as so many bits of them are here, and read the rest later: lossy, and
    results depend on when reads end. 0, or experts without planes: only whole ones, the same bits always. `upgrades`
    False leaves the rest away for good, to see what it is worth.

    `prediction`: what may be done about the next layer's experts (`prediction_setting`).
    """

    budget_bytes: int
    policy: str = DEFAULT_POLICY
    lanes: int = DEFAULT_LANES
    direct: bool = True
    ring: bool = True
    one_call: bool = True
    refetch: Refetch | None = None
    read: ReadInto = read_into
    start_bits: int = ALL_BITS
    upgrades: bool = True
    prediction: str = AUTO


class ExpertCache:
    """Raises CapacityError below one token's cycle, BundleError where a store can't be read."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        options: CacheOptions,
        clock: Callable[[], float] = time.perf_counter,
        gates: Sequence[PackedMatrix | None] = (),
    ) -> None:
        """`gates`: of each layer's next one (`next_gates`), for guesses."""
        check_budget(layers, options.budget_bytes)
        if options.policy not in POLICIES:
            raise EngineError(
                f"{options.policy!r} is not a cache policy", hint=f"choose one of {', '.join(POLICIES)}"
            )
        if options.start_bits not in CHOICES:
            raise EngineError(
                f"experts can't start with {options.start_bits} bits", hint="use 2 or 4, or 0 for all"
            )
        if options.prediction not in PREDICTIONS:
            raise EngineError(
                f"{options.prediction!r} is no way to use predictions",
                hint=f"choose one of {', '.join(PREDICTIONS)}",
            )
        self.layers = {layer.layer: layer for layer in layers}
        self.budget_bytes = options.budget_bytes
        self.statistics = CacheStatistics(layer.layer for layer in layers)
        self._pools = make_pools(layers, options.budget_bytes, options.policy, start_bits=options.start_bits)
        self._reader = ExpertReader(
            layers,
            lanes=options.lanes,
            direct=options.direct,
            refetch=options.refetch,
            read=options.read,
        )
        self._ring: RingReads | None = None
        if options.ring and options.read is read_into:
            self._ring = kernel_reads(layers, self._reader, one_call=options.one_call)
        self._native: dict[int, NativeLayer] = {}
        if self._ring is not None and options.one_call:
            self._native = native_layers(layers, self._pools, self._ring, self._reader)
        self._reads = self._ring or LaneReads(self._reader, clock)
        self._clock = clock
        self._checks_later = False
        self._wrong: list[tuple[int, Landed]] = []  # (layer, plane) of what was used unchecked
        self._threads = 1  # of the last call
        self._step = 0
        self._last_layer = -1
        self._guesses = False  # whether `prediction` has anything to do in this step
        self._end_layer = max(self.layers)
        self._batch: ReadBatch | None = None
        self._native_batch = (
            ReadBatch()
        )  # of all native calls, which hear from the ring that they are cancelled
        self.upgrades: Upgrades | None = (
            None  # None: experts are whole before they are used, or stay as they are
        )
        if self.is_lossy and options.upgrades:
            self.upgrades = Upgrades(set(self._pools.values()), self._reader, self.statistics)
        self.prediction: Prediction | None = make_prediction(
            layers, self._pools, self._reader, self.statistics, gates, options.prediction
        )

    @property
    def is_lossy(self) -> bool:
        """Experts may be used before they are complete: results depend on when reads end."""
        return any(pool.is_lossy for pool in self._pools.values())

    def layer_of(self, tensor: str) -> int:
        """Number of the layer whose experts are `tensor`."""
        for layer in self.layers.values():
            if layer.tensor == tensor:
                return layer.layer
        raise EngineError(f"the expert cache of this stage does not know {tensor}")

    def absent(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those that are not in memory now, each once. Says nothing to the policy."""
        pool = self._pools[layer]
        slot, first_key = pool.table.slot, pool.first_key[layer]
        return [expert for expert in dict.fromkeys(experts) if slot(first_key + expert) == ABSENT]

    def has_room(self, layer: int) -> bool:
        """Whether an expert more fits without one that has to go."""
        table = self._pools[layer].table
        return table.resident < table.slots

    @property
    def arena_bytes(self) -> int:
        return sum(pool.arena.total_bytes for pool in set(self._pools.values()))

    @property
    def total_bytes(self) -> int:
        return sum(layer.total_bytes for layer in self.layers.values())

    @property
    def reader(self) -> ExpertReader:
        return self._reader

    @property
    def kernel_reads(self) -> bool:
        """The kernel reads on its own; lanes do otherwise."""
        return self._ring is not None

    @property
    def kernel_times(self) -> FlashTimes:
        """Where the time of layers with misses went, so far. Only with `kernel_reads`."""
        return NO_TIMES if self._ring is None else self._ring.native.times

    def pool(self, layer: int) -> Pool:
        """Whose experts are in memory, and where: to look at."""
        return self._pools[layer]

    def cancel(self) -> None:
        """Reads of the batch that runs now are given up, and the batch fails."""
        batch = self._batch
        if batch is not None:
            batch.cancelled = True
            if self._ring is not None:
                self._ring.cancel()

    def close(self) -> None:
        self.cancel()
        if self.upgrades is not None:
            self.upgrades.cancel()
        if self.prediction is not None:
            self.prediction.cancel()
        if self._ring is not None:
            self._ring.close()
        self._reader.close()
        self._native = {}
        self._pools = {}

    def run_checked(self, work: Callable[[], T]) -> T:
        """What `work` gives, which calls `run` for some layers: experts are used as soon as they have come, and all are
        checked before this returns. When one was wrong it is put right, and `work` runs once more, with every check
        before its use.

        So `work` must be such that it can, and nobody may see what it does before this returns. Raises what `work`
        raises, and what a read failed with.
        """
        if self.prediction is None:
            return self._run_checked(work)
        begin = self._clock()
        result = self._run_checked(work)
        self.prediction.made(self._clock() - begin)
        return result

    def _run_checked(self, work: Callable[[], T]) -> T:
        if not self._native:
            return work()
        failure: Exception | None = None
        result: T | None = None
        self._checks_later = True
        try:
            result = work()
        except Exception as problem:  # of wrong bytes, maybe
            failure = problem
        finally:
            self._checks_later = False
            is_right = self._check()
        if not is_right and not isinstance(failure, Cancelled):
            return work()
        if failure is not None:
            raise failure
        self._begin_upgrades()
        return cast(T, result)

    def _check(self) -> bool:
        """Whether all that was used unchecked was right. What was not is right now, or gone. Raises what a read failed
        with."""
        self._look_for_wrong()
        wrong: dict[int, list[Landed]] = {}
        for layer, one in self._wrong:
            wrong.setdefault(layer, []).append(one)
        self._wrong = []
        if wrong and self.prediction is not None:
            self.prediction.stop()  # what is put right must not be under way once more
        problems = [self._native[layer].wrong(landed) for layer, landed in wrong.items()]
        for problem in problems:
            if problem is not None:
                raise problem
        return not wrong

    def _look_for_wrong(self) -> None:
        if self._ring is not None:
            self._wrong += self._ring.check(self._threads)

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32:
        """What `run_experts` gives, bit for bit where this is not lossy.

        Raises TamperedError (names layer, expert and plane), EngineError.
        """
        if layer <= self._last_layer:
            self._step += 1
            self._guesses = self.prediction is not None and self.prediction.begin_step(len(ids))
        self._last_layer, self._threads = layer, threads
        order = StepOrder(self._step, activation, threads, self._checks_later)
        if self._guesses or self.upgrades is not None:
            return self._run_watched(layer, x, ids, gates, order)
        return self._run_layer(layer, x, ids, gates, order)

    def _run_watched(self, layer: int, x: Float32, ids: Int32, gates: Float32, order: StepOrder) -> Float32:
        """With what there is to do beside it: for experts that are guessed, or completed."""
        if self.upgrades is not None:
            self.upgrades.take_arrived()
        prediction = self.prediction if self._guesses else None
        if prediction is not None:
            prediction.before(layer, x, ids, order.number, self._look_for_wrong)
        result = self._run_layer(layer, x, ids, gates, order)
        if prediction is not None:
            prediction.after(layer)
        self._begin_upgrades()
        return result

    def _run_layer(self, layer: int, x: Float32, ids: Int32, gates: Float32, order: StepOrder) -> Float32:
        native = self._native.get(layer)
        if native is None or not native.takes(ids):
            return self._run_in_steps(layer, x, ids, gates, order)
        self._batch = self._native_batch
        try:
            result, found = native.run(x, ids, gates, order)
        finally:
            self._batch = None
        self.statistics.count(
            layer,
            hits=found.hits,
            misses=found.misses,
            read_bytes=found.misses * native.miss_bytes,
            waited_seconds=found.waited_seconds,
            fewer_bits=0 if native.is_whole else found.hits + found.misses,
        )
        return result

    def _run_in_steps(self, layer: int, x: Float32, ids: Int32, gates: Float32, order: StepOrder) -> Float32:
        if order.checks_later:
            self._look_for_wrong()  # in slots that may be taken now
        pool, own = self._pools[layer], self.layers[layer]
        run = LayerRun(self._reads, pool, own, x, ids, gates, order.activation, order.threads)
        here, absent = run.look_up(order.number)
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
            read_bytes=len(absent) * own.plane_start(pool.start_planes),
            waited_seconds=run.waited_seconds,
            fewer_bits=run.fewer_bits,
        )
        return result

    def _begin_upgrades(self) -> None:
        """At the end of a step, and of its checks: what turns out wrong goes, and must not be under way then."""
        if self.upgrades is not None and self._last_layer == self._end_layer and not self._checks_later:
            self.upgrades.begin()


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


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
