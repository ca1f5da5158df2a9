"""How fast a product would be with all experts in memory, at the same minute: between its tokens, a token is computed
with experts that happen to be in its cache.

A machine's speed changes by a third within a minute, so what the arm in memory took some minutes ago says nothing of
the compute terms of the product's limit. The same stage, weights and threads compute here, by the call that the arm in
memory makes for each layer. Such a token takes a position of the session before the token that belongs there, whose
rows it leaves to be written anew; who is in the cache, and in what order who goes, stays as it is.

Knows: caches, tables of slots. Does not know: stages, limits.
"""

from __future__ import annotations

import numpy as np
from edge_kernels.experts import ExpertWeights, run_experts
from numpy.typing import NDArray

from edge_runtime.experts.cache import ExpertCache

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class MemoryBeside:
    """`choose` before each token; `run` is a layer of it."""

    def __init__(self, cache: ExpertCache, top_k: int, threads: int, seed: int = 1) -> None:
        self.threads = threads
        self._cache, self._top_k = cache, top_k
        self._random = np.random.default_rng(seed)
        self._slots: dict[int, Int32] = {}

    def choose(self) -> None:
        """Any experts: those of all layers with the same shapes lie in one arena, and take the same time."""
        here: dict[int, Int32] = {}  # by pool
        for layer in self._cache.layers:
            pool = self._cache.pool(layer)
            if id(pool) not in here:
                keys = [pool.table.key(slot) for slot in range(pool.table.slots)]
                here[id(pool)] = np.flatnonzero(np.array(keys) >= 0).astype(np.int32)
            self._slots[layer] = self._random.choice(here[id(pool)], self._top_k, replace=False)[None]

    def run(self, layer: int, x: Float32, gates: Float32, count: int = 0) -> Float32:
        """x [1, hidden], gates [1, count] -> [1, hidden]. `count` 0: a token's experts."""
        slots, weights = self.some(layer, count or self._top_k, is_last=True)
        return run_experts(x, slots, gates, weights, activation="silu", threads=self.threads)

    def some(self, layer: int, count: int, *, is_last: bool = False) -> tuple[Int32, ExpertWeights]:
        """[1, count], the first or last of the layer's that were chosen."""
        slots = self._slots[layer][:, -count:] if is_last else self._slots[layer][:, :count]
        return slots, self._cache.pool(layer).weights[layer][-1]
