"""Mixture-of-experts layers: routing, and running the chosen experts straight from the bytes of a mapped slice.

Expert e's arrays start `e * stride_bytes` after expert 0's: gate and up [intermediate, hidden], down [hidden,
intermediate], in fp32, in the int8/int4 layout of `edge_kernels.quantization` (data, and scales beside it), or in the
planes of `edge_kernels.nested`: "nested2" reads the first, "nested4" two, "nested8" all three.

Knows: that layout and the arithmetic. Does not know: bundles, files, caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels.nested import (
    FINE_BYTES,
    GROUP,
    PLANE_BYTES,
    SCALE_BYTES,
    NestedMatrix,
    dequantize_nested,
)
from edge_kernels.quantization import BITS, BLOCK, QuantizedMatrix, dequantize

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

PARTS = ("gate", "up", "down")
NESTED_BITS = {"nested2": 2, "nested4": 4, "nested8": 8}  # in the order of their planes


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """All experts of one layer, as bytes. `format`: "fp32", "int8", "int4", "nested2", "nested4" or "nested8".

    Offsets are from the buffer's start: gate, up, down; but for fp32 gate_scales, up_scales, down_scales; for nested4
    and nested8 gate_low, up_low, down_low; for nested8 gate_fine, up_fine, down_fine.
    """

    buffer: U8  # one slice, mapped
    format: str
    num_experts: int
    hidden: int
    intermediate: int
    stride_bytes: int
    offsets: Mapping[str, int]
    part_offsets: NDArray[np.int64] = field(
        init=False, repr=False, compare=False
    )  # as native kernels take them

    def __post_init__(self) -> None:
        if self.format not in ("fp32", *BITS, *NESTED_BITS):
            raise ValueError(
                f"unknown expert format {self.format!r}: choose fp32, {', '.join((*BITS, *NESTED_BITS))}"
            )
        if min(self.num_experts, self.hidden, self.intermediate) < 1:
            raise ValueError("experts need at least one expert, one hidden and one intermediate channel")
        if self.buffer.dtype != np.uint8 or self.buffer.ndim != 1 or not self.buffer.flags.c_contiguous:
            raise ValueError("experts need their slice as one contiguous uint8 array")
        names = set(_part_names(self.format))
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
        ordered = np.array([self.offsets[name] for name in _part_names(self.format)], np.int64)
        object.__setattr__(self, "part_offsets", ordered)

    def part_shape(self, part: str) -> tuple[int, ...]:
        name, _, kind = part.partition("_")
        rows, columns = (
            (self.hidden, self.intermediate) if name == "down" else (self.intermediate, self.hidden)
        )
        if self.format == "fp32":
            return rows, columns
        if self.format in NESTED_BITS:
            group_bytes = {"scales": SCALE_BYTES, "fine": FINE_BYTES}.get(kind, PLANE_BYTES)
            return rows, -(-columns // GROUP), group_bytes
        blocks = -(-columns // BLOCK)
        return (rows, blocks) if kind else (rows, blocks, BLOCK * BITS[self.format] // 8)

    def part_bytes(self, part: str) -> int:
        return int(np.prod(self.part_shape(part))) * self._dtype(part).itemsize

    def part(self, expert: int, part: str) -> NDArray[np.generic]:
        """View of one expert's array."""
        start = self.offsets[part] + expert * self.stride_bytes
        data = self.buffer[start : start + self.part_bytes(part)]
        return data.view(self._dtype(part)).reshape(self.part_shape(part))

    def matrix(self, expert: int, part: str) -> F32:
        """One expert's matrix in float32: the slow, readable way in."""
        data = self.part(expert, part)
        columns = self.intermediate if part == "down" else self.hidden
        if self.format == "fp32":
            return data.astype(np.float32)
        if self.format in NESTED_BITS:
            return dequantize_nested(self._nested(expert, part), NESTED_BITS[self.format], columns)
        scales = self.part(expert, f"{part}_scales")
        quantized = QuantizedMatrix(data.astype(np.uint8), scales.astype(np.float32))
        return dequantize(quantized, self.format, columns)

    def _nested(self, expert: int, part: str) -> NestedMatrix:
        """With the first plane in the place of the second where it has none: it is not read."""
        planes = {
            kind: self.part(expert, part + kind).astype(np.uint8)
            for kind in ("", "_scales", "_low", "_fine")
            if part + kind in self.offsets
        }
        low = planes.get("_low", planes[""])
        return NestedMatrix(planes[""], low, planes["_scales"], planes.get("_fine"))

    def _dtype(self, part: str) -> np.dtype[np.generic]:
        is_float = self.format == "fp32" or (part.endswith("_scales") and self.format in BITS)
        return np.dtype(np.float32 if is_float else np.uint8)


def route(logits: F32, *, top_k: int, normalize: bool, softmax_after: bool) -> tuple[I32, F32]:
    """Chosen experts (largest logit first, ties to the lower id) and their gates, both [R, top_k].

    Gates are the softmax over all experts, divided by their sum where `normalize`; `softmax_after` takes the softmax
    over the chosen logits, which is the same as normalizing. A row with a logit that is not finite gets NaN gates.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"route needs logits [R, experts] and 1 to that many experts a row, not {top_k}")
    ids = np.empty((len(logits), top_k), np.int32)
    gates = np.empty((len(logits), top_k), np.float32)
    _native.route(np.ascontiguousarray(logits, np.float32), normalize, softmax_after, ids, gates)
    return ids, gates


def run_experts(
    x: F32, ids: I32, gates: F32, weights: ExpertWeights, *, activation: str, threads: int = 1
) -> F32:
    """Sum over a row's experts, in the order given, of gate * down(silu(gate_proj x) * up_proj x): [R, hidden].

    But for fp32 weights the activations are quantized to int8 in blocks of 32. A row's bits do not depend on the
    other rows, on `threads` or on the instruction set.
    """
    if activation != "silu":
        raise ValueError(f"unknown activation {activation!r}: experts know silu")
    if x.ndim != 2 or ids.ndim != 2 or gates.ndim != 2:
        raise ValueError("experts need rows [R, hidden], ids [R, top_k] and gates [R, top_k]")
    y = np.empty((len(x), weights.hidden), np.float32)
    _native.run_experts(
        np.ascontiguousarray(x, np.float32),
        np.ascontiguousarray(ids, np.int32),
        np.ascontiguousarray(gates, np.float32),
        weights.buffer,
        weights.format,
        weights.num_experts,
        weights.hidden,
        weights.intermediate,
        weights.stride_bytes,
        weights.part_offsets,
        y,
        threads,
    )
    return y


def run_each(x: F32, ids: I32, weights: ExpertWeights, *, activation: str, threads: int = 1) -> F32:
    """Row i of the result [N, hidden] is what expert ids[i] makes of x[i]: `run_experts` without the last sum.

    With `combine` it gives the bits of `run_experts`, in as many calls as the experts take to arrive.
    """
    ones = np.ones((len(ids), 1), np.float32)
    return run_experts(x, ids[:, None], ones, weights, activation=activation, threads=threads)


def combine(outputs: F32, gates: F32) -> F32:
    """[R * top_k, hidden] of single experts, row after row in gate order, and [R, top_k] gates to [R, hidden]."""
    if outputs.ndim != 2 or gates.ndim != 2:
        raise ValueError("combine needs outputs [R * top_k, hidden] and gates [R, top_k]")
    y = np.empty((len(gates), outputs.shape[1]), np.float32)
    _native.combine_experts(
        np.ascontiguousarray(outputs, np.float32), np.ascontiguousarray(gates, np.float32), y
    )
    return y


def _part_names(format: str) -> tuple[str, ...]:
    """In the order the native kernel takes their offsets."""
    more: dict[str, tuple[str, ...]] = {
        "fp32": (),
        "nested4": ("scales", "low"),
        "nested8": ("scales", "low", "fine"),
    }
    kinds = more.get(format, ("scales",))
    return PARTS + tuple(f"{part}_{kind}" for kind in kinds for part in PARTS)
