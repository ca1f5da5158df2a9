"""Who runs the experts of one layer: the kernel over a mapped slice, a cache in front of flash, or several devices.

The bits are the same. Knows: mapped slices. Does not know: routing, batches, where a cache's budget comes from.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from edge_kernels.experts import ExpertWeights, run_experts
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.errors import EngineError

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class ExpertRunner(Protocol):
    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        """x [R, hidden], ids and gates [R, top_k] -> [R, hidden]."""
        ...


class ExpertSource(Protocol):
    """The experts of a stage where they are not mapped: a cache in front of flash, or other devices."""

    def layer_of(self, tensor: str) -> int:
        """Number of the layer whose experts are `tensor`."""
        ...

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32: ...


class MappedExperts:
    """All experts of a layer where they are mapped: in memory once they were touched."""

    def __init__(self, weights: ExpertWeights, activation: str, threads: int) -> None:
        self._weights, self._activation, self._threads = weights, activation, threads

    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        return run_experts(x, ids, gates, self._weights, activation=self._activation, threads=self._threads)


class SourcedExperts:
    def __init__(self, source: ExpertSource, layer: int, activation: str, threads: int) -> None:
        self._source, self._layer = source, layer
        self._activation, self._threads = activation, threads

    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        return self._source.run(
            self._layer, x, ids, gates, activation=self._activation, threads=self._threads
        )


def expert_runner(
    bundle: Bundle, tensor: str, activation: str, threads: int, source: ExpertSource | None
) -> ExpertRunner:
    """Raises EngineError (experts in several slices), BundleError (slices that can't be mapped)."""
    if source is not None:
        return SourcedExperts(source, source.layer_of(tensor), activation, threads)
    return MappedExperts(_mapped(bundle, tensor), activation, threads)


def _mapped(bundle: Bundle, name: str) -> ExpertWeights:
    tensor = bundle.manifest.tensors[name]
    slices = {part.slice for part in tensor.parts.values()}
    if len(slices) != 1:
        raise EngineError(f"the experts {name} lie in {len(slices)} slices; they must lie in one")
    experts, intermediate, hidden = tensor.shape
    return ExpertWeights(
        buffer=np.frombuffer(bundle.slice_bytes(slices.pop()), np.uint8),
        format=tensor.format.removeprefix("experts_"),
        num_experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        stride_bytes=tensor.expert_stride_bytes,
        offsets={key: part.offset_bytes for key, part in tensor.parts.items()},
    )
