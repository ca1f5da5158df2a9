"""What an expert cache does about the next layer's experts while this layer runs: nothing, keep or read them.

Nothing is done before a trial has said that it makes tokens faster here (`trial`): keeping and reading are tried apart.
Results are the same bits whatever is guessed.

Knows: the order of layers and steps, who guesses best, which trial is on. Does not know: how experts are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from edge_kernels.linear import PackedMatrix
from numpy.typing import NDArray

from edge_runtime.experts.affinity import MOST_BYTES, Affinity
from edge_runtime.experts.ahead import ReadAhead
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.next_gate import NextGate
from edge_runtime.experts.pool import Pool
from edge_runtime.experts.prediction_setting import AUTO, KEEP, OFF, READ
from edge_runtime.experts.predictor import Predictor, wanted
from edge_runtime.experts.reader import ExpertReader
from edge_runtime.experts.recall import MOST_ROWS, Recall
from edge_runtime.experts.retention import Retention
from edge_runtime.experts.slot_table import ABSENT
from edge_runtime.experts.statistics import CacheStatistics
from edge_runtime.experts.trial import Trial

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MOST_READ = 2  # of a layer, ahead
LEAST_RECALL = 0.5  # below it more reads would be wrong than right
LEAST_READS = 0.5  # a token; with fewer there is nothing to gain
_NEW_SHARE = 1 / 16  # of a token in the mean of reads


class Prediction:
    """`begin_step`; where it says so, `before` and `after` each layer of the step, in order; `made` after a step that
    was timed."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        pools: Mapping[int, Pool],
        reader: ExpertReader,
        statistics: CacheStatistics,
        gates: Sequence[PackedMatrix | None],
        mode: str = AUTO,
    ) -> None:
        self._layers = tuple(sorted(layers, key=lambda layer: layer.layer))
        self._places = {layer.layer: place for place, layer in enumerate(self._layers)}
        self._pools, self._reader, self._mode = pools, reader, mode
        self._affinity = _affinity(self._layers)
        self._gate = NextGate(gates)
        numbers = [layer.layer for layer in self._layers]
        self._recall = Recall(numbers, self._gate, self._affinity, statistics)
        self._retention = Retention()
        self._ahead = ReadAhead(reader, statistics)
        self.keeping, self.reading = Trial("keeping"), Trial("reading ahead")
        self._keeps = self._reads = False  # in this step
        self._is_small = False  # this step: few rows, as in decoding
        self._postponed: Callable[[], None] | None = None
        self._reads_before = self._bytes_before = 0
        self._token_reads = 0.0  # mean of late

    @property
    def says(self) -> str:
        """What is known and done, for people."""
        return (
            f"{self._recall.recall:.0%} of experts are named a layer ahead; keeping them: {self.keeping.says}; "
            f"reading them ahead: {self.reading.says}"
        )

    def begin_step(self, rows: int) -> bool:
        """Whether there is anything to do in this step, which has so many rows."""
        self._retention.let_go()
        self._postponed = None
        self._is_small = rows <= MOST_ROWS
        self._keeps = self._mode in (KEEP, READ) or self.keeping.is_on
        self._reads = self._mode == READ or self.reading.is_on
        is_noted = self._recall.begin_step(rows)
        if not self._is_small:
            self._ahead.stop()
            return False
        return is_noted or self._keeps or self._reads or self._ahead.is_busy

    def before(self, layer: int, x: Float32, ids: Int32, step: int, check: Callable[[], None]) -> None:
        """The layer is asked for `ids` [R, top_k] with x [R, hidden], and has not looked for them yet. `check` makes
        checks that were put off."""
        place = self._places[layer]
        self._retention.let_go()
        self._postponed = None
        pool = self._pools[layer]
        if 2 * ids.size > pool.table.slots:
            self._ahead.stop()
            return
        self._recall.note(place, x, ids)
        if not (self._keeps or self._reads or self._ahead.is_busy):
            return
        asked = set(ids.reshape(-1).tolist())
        first_key = pool.first_key[layer]
        is_missed = any(pool.table.slot(first_key + expert) == ABSENT for expert in asked)
        if self._ahead.is_busy:
            self._ahead.settle(layer, asked, is_missed=is_missed)
        predictor = self._predictor(place)
        if predictor is not None and (self._keeps or self._reads):
            following = self._layers[place + 1]
            guess = wanted(predictor.scores(place, x, ids), following.top_k)
            self._act(following, guess, ids.size, step, check, is_missed=is_missed)

    def after(self, layer: int) -> None:
        """The layer's rows are made, and nobody waits for flash."""
        postponed, self._postponed = self._postponed, None
        if postponed is not None:
            postponed()
        if layer == self._layers[-1].layer:
            self._recall.end_step()

    def made(self, seconds: float) -> None:
        """The step that has just ended took so long. Does what the trials need."""
        reads, read_bytes = self._reader.counters.reads, self._reader.counters.read_bytes
        new_reads, new_bytes = reads - self._reads_before, read_bytes - self._bytes_before
        self._reads_before, self._bytes_before = reads, read_bytes
        if not self._is_small:
            return
        self._token_reads += (new_reads - self._token_reads) * _NEW_SHARE
        reason = self._reason_not()
        for trial, other in ((self.keeping, self.reading), (self.reading, self.keeping)):
            trial.made(seconds, new_bytes, "the other is" if other.is_trying else reason)

    def stop(self) -> None:
        """Nothing is on its way, and nothing held, afterwards."""
        self._retention.let_go()
        self._postponed = None
        self._ahead.stop()

    def cancel(self) -> None:
        self._ahead.cancel()

    def _predictor(self, place: int) -> Predictor | None:
        if place + 1 == len(self._layers):
            return None
        best = self._recall.best(place)
        if best is None and self._mode != AUTO:
            return self._gate if self._gate.reaches(place) else self._affinity
        return best

    def _act(
        self,
        following: ExpertLayer,
        guess: Sequence[int],
        uses: int,
        step: int,
        check: Callable[[], None],
        *,
        is_missed: bool,
    ) -> None:
        pool = self._pools[following.layer]
        first_key = pool.first_key[following.layer]
        if self._keeps:
            flying = self._ahead.flying
            keys = [first_key + expert for expert in guess if (following.layer, expert) not in flying]
            self._retention.keep(pool.table, keys, uses)
        absent = [expert for expert in guess if pool.table.slot(first_key + expert) == ABSENT][:MOST_READ]
        if not self._reads or not absent:
            return

        def begin() -> None:
            self._ahead.begin(pool, following, absent, step, uses, check)

        if is_missed:
            self._postponed = begin  # behind what this layer waits for
        else:
            begin()

    def _reason_not(self) -> str:
        """Why nothing should be tried now; "": there is none."""
        if self._recall.recall < LEAST_RECALL:
            return f"{self._recall.recall:.0%} of experts are named a layer ahead, too few"
        if self._token_reads < LEAST_READS:
            return "nearly all experts are in memory"
        return ""


def make_prediction(
    layers: Sequence[ExpertLayer],
    pools: Mapping[int, Pool],
    reader: ExpertReader,
    statistics: CacheStatistics,
    gates: Sequence[PackedMatrix | None],
    mode: str,
) -> Prediction | None:
    """None where there is nothing to guess, or where experts are used before they are whole, and planes have an order
    of their own."""
    if mode == OFF or len(layers) < 2 or any(pool.is_lossy for pool in pools.values()):
        return None
    return Prediction(layers, pools, reader, statistics, gates, mode)


def _affinity(layers: Sequence[ExpertLayer]) -> Affinity | None:
    """None where layers are not alike, or counts would take much memory."""
    shapes = {(layer.experts, layer.top_k) for layer in layers}
    experts = layers[0].experts
    if len(shapes) > 1 or Affinity.size_bytes(len(layers), experts) > MOST_BYTES:
        return None
    return Affinity(len(layers), experts)
