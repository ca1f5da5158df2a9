"""Mixture-of-experts layers: routing, and running the chosen experts straight from the bytes of a mapped slice.

Expert e's arrays start `e * stride_bytes` after expert 0's: gate and up [intermediate, hidden], down [hidden,
intermediate], in fp32 or in the int8/int4 layout of `edge_kernels.quantization` (data, and scales beside it).

Knows: that layout and the arithmetic. Does not know: bundles, files, caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels import reference
from edge_kernels.quantization import BITS, BLOCK, QuantizedMatrix, dequantize

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """All experts of one layer, as bytes. `format`: "fp32", "int8" or "int4"; offsets are from the buffer's start."""

    buffer: U8  # one slice, mapped
    format: str
    num_experts: int
    hidden: int
    intermediate: int
    stride_bytes: int
    offsets: Mapping[str, int]  # gate, up, down, and for int8/int4 gate_scales, up_scales, down_scales

    def __post_init__(self) -> None:
        if self.format != "fp32" and self.format not in BITS:
            raise ValueError(f"unknown expert format {self.format!r}: choose fp32, int8 or int4")
        if min(self.num_experts, self.hidden, self.intermediate) < 1:
            raise ValueError("experts need at least one expert, one hidden and one intermediate channel")
        if self.buffer.dtype != np.uint8 or self.buffer.ndim != 1 or not self.buffer.flags.c_contiguous:
            raise ValueError("experts need their slice as one contiguous uint8 array")
        names = set(PARTS) if self.format == "fp32" else {*PARTS, *(f"{part}_scales" for part in PARTS)}
        if set(self.offsets) != names:
            raise ValueError(
                f"{self.format} experts need the parts {sorted(names)}, not {sorted(self.offsets)}"
            )
        if self.stride_bytes < 0 or (self.num_experts > 1 and self.stride_bytes == 0):
            raise ValueError("the distance between experts must be above 0")
        base = (self.num_experts - 1) * self.stride_bytes
        for name, offset in self.offsets.items():
            end = offset + base + self.part_bytes(name)
            if offset < 0 or end > self.buffer.size:
                raise ValueError(
                    f"{name} of the last expert ends at byte {end} of a slice of {self.buffer.size}"
                )
            if (name.endswith("_scales") or self.format == "fp32") and (offset | self.stride_bytes) % 4:
                raise ValueError(f"{name} must lie on a 4-byte boundary")

    def part_shape(self, part: str) -> tuple[int, ...]:
        name = part.removesuffix("_scales")
        rows, columns = (
            (self.hidden, self.intermediate) if name == "down" else (self.intermediate, self.hidden)
        )
        if self.format == "fp32":
            return rows, columns
        blocks = -(-columns // BLOCK)
        return (rows, blocks) if part != name else (rows, blocks, BLOCK * BITS[self.format] // 8)

    def part_bytes(self, part: str) -> int:
        item = 4 if part.endswith("_scales") or self.format == "fp32" else 1
        return int(np.prod(self.part_shape(part))) * item

    def part(self, expert: int, part: str) -> NDArray[np.generic]:
        """View of one expert's array."""
        start = self.offsets[part] + expert * self.stride_bytes
        dtype = np.float32 if part.endswith("_scales") or self.format == "fp32" else np.uint8
        return self.buffer[start : start + self.part_bytes(part)].view(dtype).reshape(self.part_shape(part))

    def matrix(self, expert: int, part: str) -> F32:
        """One expert's matrix in float32: the slow, readable way in."""
        data = self.part(expert, part)
        if self.format == "fp32":
            return data.astype(np.float32)
        quantized = QuantizedMatrix(
            data.astype(np.uint8), self.part(expert, f"{part}_scales").astype(np.float32)
        )
        return dequantize(quantized, self.format, self.intermediate if part == "down" else self.hidden)


route = reference.route
run_experts = reference.run_experts
