"""Some experts of some layers, all in memory: what one of several devices holds that share them.

Knows: arenas, slots, and which expert is in which. Does not know: where the bytes come from, who asks for what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from edge_kernels.experts import ExpertWeights, run_each, run_experts
from numpy.typing import NDArray

from edge_runtime.errors import EngineError
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

ABSENT = -1


class _HeldLayer:
    def __init__(self, layer: ExpertLayer, experts: Sequence[int]) -> None:
        self.layer = layer
        self.slots: Int32 = np.full(layer.experts, ABSENT, np.int32)
        self.slots[list(experts)] = np.arange(len(experts))
        self.arena = Arena(len(experts), layer.stride_bytes)
        self.weights = ExpertWeights(
            buffer=self.arena.bytes,
            format=layer.format,
            num_experts=len(experts),
            hidden=layer.hidden,
            intermediate=layer.intermediate,
            stride_bytes=layer.stride_bytes,
            offsets=layer.offsets,
        )


class PeerStore:
    """Layers that nothing is held of take no memory. Every expert is put in once, before anything is run."""

    def __init__(self, layers: Sequence[ExpertLayer], held: Mapping[int, Sequence[int]]) -> None:
        self.layers = {layer.layer: layer for layer in layers}
        self._held = {n: _HeldLayer(layer, held[n]) for n, layer in self.layers.items() if held.get(n)}

    @property
    def held_bytes(self) -> int:
        return sum(held.arena.total_bytes for held in self._held.values())

    @property
    def total_bytes(self) -> int:
        """Of all experts of these layers, wherever they are."""
        return sum(layer.total_bytes for layer in self.layers.values())

    def experts(self) -> Iterator[tuple[ExpertLayer, int]]:
        """Everything that is to be put in."""
        for held in self._held.values():
            for expert in np.flatnonzero(held.slots != ABSENT):
                yield held.layer, int(expert)

    def put(self, layer: int, expert: int, data: bytes | memoryview) -> bool:
        """False, and nothing done, where the bytes are not those that the manifest names."""
        held = self._held[layer]
        if not held.layer.is_right(expert, data):
            return False
        held.arena.slot(int(held.slots[expert]))[:] = data
        return True

    def holds(self, layer: int, experts: Int32) -> bool:
        """Whether all of these (whatever numbers they are) are here."""
        held = self._held.get(layer)
        if held is None or len(experts) == 0:
            return False
        if experts.min() < 0 or experts.max() >= len(held.slots):
            return False
        return bool((held.slots[experts] != ABSENT).all())

    def run_each(self, layer: int, x: Float32, experts: Int32, *, activation: str, threads: int) -> Float32:
        """Row i of the result [N, hidden] is what expert experts[i] makes of x[i]."""
        held = self._held_layer(layer)
        return run_each(x, held.slots[experts], held.weights, activation=activation, threads=threads)

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32:
        """Where all of `ids` are here: what `run_experts` gives over the whole layer."""
        held = self._held_layer(layer)
        return run_experts(x, held.slots[ids], gates, held.weights, activation=activation, threads=threads)

    def close(self) -> None:
        self._held = {}

    def _held_layer(self, layer: int) -> _HeldLayer:
        held = self._held.get(layer)
        if held is None:
            raise EngineError(f"this device holds no expert of layer {layer}")
        return held
