"""The next layer's router, applied to what this layer's router saw.

A residual stream changes little from layer to layer, so from this layer's hidden state the next router mostly chooses
what it will choose from its own. What a router sees is normalised: x = h / |h| * w. The next one's weights w' are
folded into its matrix in place of this one's, G' (w' / w), so that x is used as it is.

Knows: a bundle's routers. Does not know: who asks, slots, what a guess is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from edge_kernels.linear import PackedMatrix, linear, pack
from edge_kernels.quantization import quantize
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block
from edge_runtime.bundle.operations import Operation
from edge_runtime.engine.weights import read_tensor

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_LEAST_SHARE = 1e-3  # of the largest: a channel that this layer's norm silences says nothing of the next


class NextGate:
    """`gates[place]`: of the layer after that at `place`, folded. None: it can't be foreseen."""

    name = "next gate"

    def __init__(self, gates: Sequence[PackedMatrix | None]) -> None:
        self._gates = tuple(gates)

    def reaches(self, place: int) -> bool:
        return place < len(self._gates) and self._gates[place] is not None

    def scores(self, place: int, x: Float32, ids: Int32) -> Float32:
        gate = self._gates[place]
        assert gate is not None
        return linear(x, gate)


def next_gates(bundle: Bundle, blocks: Sequence[Block]) -> list[PackedMatrix | None]:
    """Of blocks with experts, in order: one fewer than there are of them. int8: a guess needs no more, and it takes a
    quarter of the memory. Raises EngineError (tensors that are not there)."""
    seen = [_Seen.of(block) for block in blocks if any(o.kind == "experts" for o in block.operations)]
    return [_folded(bundle, this, following) for this, following in pairwise(seen)]


def folded(gate: Float32, own_norm: Float32 | None, next_norm: Float32 | None) -> Float32:
    """gate [experts, hidden] of the next layer; the weights of both norms [hidden], None for one that has none."""
    if next_norm is not None:
        gate = gate * next_norm
    if own_norm is not None:
        sound = np.abs(own_norm) > _LEAST_SHARE * np.abs(own_norm).max()
        gate = gate * np.where(sound, 1.0 / np.where(sound, own_norm, 1.0), 0.0)
    return np.asarray(gate, np.float32)


class _Seen:
    """What is before the experts of a block: a router, and a norm before it."""

    def __init__(self, router: Operation | None, norm: Operation | None) -> None:
        self.router, self.norm = router, norm

    @classmethod
    def of(cls, block: Block) -> _Seen:
        makes = {name: operation for operation in block.operations for name in operation.outputs}
        experts = next(operation for operation in block.operations if operation.kind == "experts")
        rows, logits = experts.inputs
        router, norm = makes.get(logits), makes.get(rows)
        if router is None or router.kind != "linear" or router.inputs != (rows,) or len(router.weights) != 1:
            router = None
        return cls(router, norm if norm is not None and norm.kind == "rms_norm" else None)


def _folded(bundle: Bundle, this: _Seen, following: _Seen) -> PackedMatrix | None:
    if following.router is None:
        return None
    gate = read_tensor(bundle, following.router.weights["weight"])
    norms = [
        None if seen.norm is None else read_tensor(bundle, seen.norm.weights["weight"]).reshape(-1)
        for seen in (this, following)
    ]
    quantized = quantize(folded(gate, *norms), "int8", search=False)
    return pack(quantized.data, quantized.scales, gate.shape[1])
