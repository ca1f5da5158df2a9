"""Running a bundle on this machine to learn how it routes and how fast it is.

Knows: stages and clocks. Does not know: what is concluded from it (`admission`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.experts.admission import MeasuredSpeed, Routing
from edge_runtime.experts.affinity import Affinity
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_probe import FlashSpeed, measure_flash
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers
from edge_runtime.experts.next_gate import NextGate, next_gates
from edge_runtime.experts.predictor import recalled
from edge_runtime.experts.runner import ExpertRunner

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

CHUNK_TOKENS = 64
TIMED_TOKENS = 16
KV_BYTES = 64 << 20
_SESSION = SessionId(1)
_NO_ROWS = np.zeros((0, 0), np.float32)
_LEARNT_TOKENS = 16  # counts are asked about so many at a time, then learn from them


@dataclass(frozen=True, slots=True)
class Examined:
    layers: tuple[ExpertLayer, ...]
    routing: Routing
    speed: MeasuredSpeed
    flash: FlashSpeed
    named: Named


@dataclass(frozen=True, slots=True)
class Named:
    """Of each layer's experts but the first's: the share that was in the top k guessed one layer before."""

    by_gate: tuple[float, ...]
    by_affinity: tuple[float, ...]  # counted from nothing on this text


class _Watched:
    """Notes what a layer was asked for, and how long it took."""

    def __init__(self, inner: ExpertRunner) -> None:
        self._inner = inner
        self.ids: list[Int32] = []
        self.x: Float32 | None = None  # of the last batch
        self.seconds = 0.0

    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        self.ids.append(ids.copy())
        self.x = x.copy()
        begin = time.perf_counter()
        result = self._inner.run(x, ids, gates)
        self.seconds += time.perf_counter() - begin
        return result


def examine(
    bundle: Bundle,
    ids: Sequence[int],
    *,
    threads: int,
    cache_bytes: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Examined:
    """Run `ids` through the model with a cache of so many bytes. Raises BundleError, CapacityError, OSError."""
    layers = expert_layers(bundle, bundle.manifest.layers)
    flash = measure_flash(layers)
    stage = CpuStage.load(
        bundle,
        LayerRange(0, bundle.manifest.num_layers - 1),
        threads=threads,
        kv_budget_bytes=KV_BYTES,
        experts=CacheOptions(cache_bytes, lanes=flash.lanes),
    )
    try:
        watched = _watch(stage)
        guesses = _Guesses(NextGate(next_gates(bundle, bundle.manifest.layers)), layers)
        stage.open(_SESSION, len(ids))
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = tuple(ids[start : start + CHUNK_TOKENS])
            stage.run(Batch((Span(_SESSION, start, chunk, 0),), None))
            guesses.compare(watched)
            advance(len(chunk))
        routing = np.stack([np.concatenate(layer.ids) for layer in watched], axis=1)
        speed = _time(stage, ids, watched, flash)
    finally:
        stage.close()
    return Examined(layers, routing, speed, flash, guesses.named(len(ids)))


class _Guesses:
    def __init__(self, gate: NextGate, layers: Sequence[ExpertLayer]) -> None:
        self._gate, self._top_k = gate, layers[0].top_k
        self._affinity = Affinity(len(layers), max(layer.experts for layer in layers))
        self._by_gate, self._by_affinity = [0] * (len(layers) - 1), [0] * (len(layers) - 1)

    def compare(self, watched: Sequence[_Watched]) -> None:
        """With the last batch of each layer."""
        ids = np.stack([layer.ids[-1] for layer in watched])
        for place in range(len(self._by_gate)):
            x = watched[place].x
            if x is not None and self._gate.reaches(place):
                self._by_gate[place] += recalled(self._gate, place, x, ids[place], ids[place + 1])
        for start in range(0, ids.shape[1], _LEARNT_TOKENS):
            some = ids[:, start : start + _LEARNT_TOKENS]
            for place in range(len(self._by_affinity)):
                self._by_affinity[place] += recalled(
                    self._affinity, place, _NO_ROWS, some[place], some[place + 1]
                )
            self._affinity.learn(some)

    def named(self, tokens: int) -> Named:
        uses = tokens * self._top_k
        return Named(
            tuple(count / uses for count in self._by_gate), tuple(count / uses for count in self._by_affinity)
        )


def _watch(stage: CpuStage) -> list[_Watched]:
    watched = []
    for block in stage.blocks.values():
        for step in block.experts_steps:
            step.runner = _Watched(step.runner)
            watched.append(step.runner)
    return watched


def _time(
    stage: CpuStage, ids: Sequence[int], watched: Sequence[_Watched], flash: FlashSpeed
) -> MeasuredSpeed:
    """One token again and again at the end of the text: after the first time its experts are in memory."""
    base = len(ids) - 1
    token = (ids[base],)
    best = (float("inf"), 0.0)
    for _ in range(TIMED_TOKENS):
        experts_before = sum(layer.seconds for layer in watched)
        begin = time.perf_counter()
        stage.run(Batch((Span(_SESSION, base, token, 1),), None))
        seconds = time.perf_counter() - begin
        if seconds < best[0]:
            best = (seconds, sum(layer.seconds for layer in watched) - experts_before)
    return MeasuredSpeed(best[0] - best[1], best[1], flash.bytes_per_second)
