"""Experts of a layer as one slice: expert after expert, each a run of pages that can be read alone.

    | gate up down gate_scales up_scales down_scales | pad to 4 KiB | gate up ...
    ^ expert 0                                                      ^ expert 1 = expert 0 + stride

Knows: that layout. Does not know: routing, caches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from edge_kernels.quantization import quantize
from numpy.typing import NDArray

from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import SLICE_ALIGNMENT_BYTES, Part, Tensor
from edge_runtime.bundle.writer import SliceWriter
from exporters.checkpoint import Floats
from exporters.sources import Expert, ExpertsSource

_PART_ALIGNMENT_BYTES = 64  # a cache line

Importance = Callable[[int, str], Floats | None]  # (expert, part) -> weight of each input channel


def write_experts(
    out: SliceWriter, source: ExpertsSource, format: str, importance: Importance = lambda expert, part: None
) -> Tensor:
    """Append all experts of a layer; one expert is in memory at a time."""
    plan = source.plan
    parts: dict[str, Part] = {}
    digests: list[str] = []
    stride_bytes = 0
    for number in range(plan.experts):
        arrays = _arrays(source.expert(number), number, format, importance)
        packed, offsets = _pack(arrays)
        whole = out.add(packed)
        digests.append(digest_of_expert(packed.data).hex())
        if number == 0:
            stride_bytes = len(packed)
            parts = {
                name: Part(whole.slice, whole.offset_bytes + offsets[name], str(array.dtype), array.shape)
                for name, array in arrays.items()
            }
    return Tensor(f"experts_{format}", plan.shape, parts, stride_bytes, tuple(digests))


def _arrays(
    expert: Expert, number: int, format: str, importance: Importance
) -> dict[str, NDArray[np.generic]]:
    if format == "fp32":
        return dict(expert.parts())
    quantized = {
        part: quantize(matrix, format, importance=importance(number, part)) for part, matrix in expert.parts()
    }
    arrays: dict[str, NDArray[np.generic]] = {part: matrix.data for part, matrix in quantized.items()}
    arrays.update({f"{part}_scales": matrix.scales for part, matrix in quantized.items()})
    return arrays


def _pack(arrays: dict[str, NDArray[np.generic]]) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """All arrays in one page-padded buffer, and where each starts in it."""
    offsets: dict[str, int] = {}
    end = 0
    for name, array in arrays.items():
        offsets[name] = -(-end // _PART_ALIGNMENT_BYTES) * _PART_ALIGNMENT_BYTES
        end = offsets[name] + array.nbytes
    packed = np.zeros(-(-end // SLICE_ALIGNMENT_BYTES) * SLICE_ALIGNMENT_BYTES, np.uint8)
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        packed[offsets[name] : offsets[name] + array.nbytes] = flat
    return packed, offsets
