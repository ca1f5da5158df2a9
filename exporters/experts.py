"""Experts of a layer as one slice: expert after expert, each a run of pages that can be read alone.

    | gate up down gate_scales up_scales down_scales | pad to 4 KiB | gate up ...
    ^ expert 0                                                      ^ expert 1 = expert 0 + stride

Bit-nested experts are two or three such runs, one behind the other: the plane that is usable alone, and what makes it
more exact.

    | gate up down gate_scales … | pad | gate_low up_low down_low | pad | gate_fine up_fine down_fine | pad | gate up …

Knows: that layout. Does not know: routing, caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from edge_kernels.nested import NestedMatrix
from edge_kernels.quantization import QuantizedMatrix
from numpy.typing import NDArray

from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import (
    FINE_PLANE,
    LOW_PLANE,
    SLICE_ALIGNMENT_BYTES,
    Part,
    Tensor,
    plane_of,
)
from edge_runtime.bundle.writer import SliceWriter
from exporters.quantize import Inputs, Quantized, expert_rounding
from exporters.sources import Expert, ExpertsSource

_PART_ALIGNMENT_BYTES = 64  # a cache line

ExpertInputs = Callable[[int, str], Inputs | None]  # of (expert, part); gate and up see the same ones


def write_experts(
    out: SliceWriter, source: ExpertsSource, format: str, inputs: ExpertInputs = lambda expert, part: None
) -> Tensor:
    """Append all experts of a layer; one expert is in memory at a time."""
    plan = source.plan
    parts: dict[str, Part] = {}
    digests: list[str] = []
    stride_bytes = 0
    for number in range(plan.experts):
        arrays = _arrays(source.expert(number), number, format, inputs)
        packed, offsets = pack(arrays)
        whole = out.add(np.concatenate(packed))
        digests += [digest_of_expert(plane.data).hex() for plane in packed]
        if number == 0:
            stride_bytes = sum(map(len, packed))
            parts = {
                name: Part(whole.slice, whole.offset_bytes + offsets[name], str(array.dtype), array.shape)
                for name, array in arrays.items()
            }
    return Tensor(f"experts_{format}", plan.shape, parts, stride_bytes, tuple(digests))


def _arrays(expert: Expert, number: int, format: str, inputs: ExpertInputs) -> dict[str, NDArray[np.generic]]:
    if format == "fp32":
        return dict(expert.parts())
    quantized = quantized_expert(expert, number, format, inputs)
    nested = {part: each for part, each in quantized.items() if isinstance(each, NestedMatrix)}
    if nested:
        return nested_arrays(nested)
    plain = {part: each for part, each in quantized.items() if isinstance(each, QuantizedMatrix)}
    arrays: dict[str, NDArray[np.generic]] = {part: matrix.data for part, matrix in plain.items()}
    arrays.update({f"{part}_scales": matrix.scales for part, matrix in plain.items()})
    return arrays


def quantized_expert(expert: Expert, number: int, format: str, inputs: ExpertInputs) -> dict[str, Quantized]:
    """Its parts: gate, up, down."""
    inner, outer = (expert_rounding(format, inputs(number, part)) for part in ("gate", "down"))
    return {part: (outer if part == "down" else inner)(matrix) for part, matrix in expert.parts()}


def nested_arrays(matrices: Mapping[str, NestedMatrix]) -> dict[str, NDArray[np.generic]]:
    """gate, up and down as the parts of an expert, in the order of their planes."""
    arrays: dict[str, NDArray[np.generic]] = {part: matrix.high for part, matrix in matrices.items()}
    arrays.update({f"{part}_scales": matrix.scales for part, matrix in matrices.items()})
    arrays.update({f"{part}{LOW_PLANE}": matrix.low for part, matrix in matrices.items()})
    fine = {f"{part}{FINE_PLANE}": matrix.fine for part, matrix in matrices.items()}
    arrays.update({name: plane for name, plane in fine.items() if plane is not None})
    return arrays


def pack(arrays: Mapping[str, NDArray[np.generic]]) -> tuple[list[NDArray[np.uint8]], dict[str, int]]:
    """One page-padded buffer for each plane, and where each array starts in all of them together."""
    offsets: dict[str, int] = {}
    planes: list[NDArray[np.uint8]] = []
    for number in sorted({plane_of(name) for name in arrays}):
        names = [name for name in arrays if plane_of(name) == number]
        start_bytes = sum(map(len, planes))
        plane, inside = _pack_plane({name: arrays[name] for name in names})
        planes.append(plane)
        offsets.update({name: start_bytes + offset for name, offset in inside.items()})
    return planes, offsets


def _pack_plane(arrays: dict[str, NDArray[np.generic]]) -> tuple[NDArray[np.uint8], dict[str, int]]:
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
