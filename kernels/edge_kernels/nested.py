"""Bit-nested matrices: planes of 2, 2 and 4 bits a weight; the first alone is a usable matrix, so are the first two.

Two planes have the codes that `quantize` gives for int4. Scales are rounded to bfloat16 and belong to the first plane:

    high plane: code >> 2    low plane: code & 3    weight = (code - 8) * scale

Of the high plane alone a weight is (4 * (code >> 2) + 1.5 - 8) * scale: the middle of the four codes it may be. A third
plane says where a weight lies around its code, in sevenths of a step (8 bits in all):

    fine plane: 0 to 15      weight = (code - 8 + (fine - 8) / 7) * scale

It reaches a step to either side, where half of one would do for codes that were rounded to the nearest: those
that make up for errors in other columns (`error_feedback`) were not, and all planes leave little to make up for. And
the largest weight of a block may lie beyond the last code.

A row of K weights is cut into groups of 128, the last one padded with zeros of scale 0; a group is 32 bytes of each of
the first planes, 64 of the third, and four scales, one for each block of 32. Byte j of a group holds four weights,
lowest bits first: of the group's even columns the j-th and the (j + 32)-th, then of its odd columns the same two. Byte
j of the third plane holds two: the j-th of the even columns, and of the odd ones.

Knows: that layout and its arithmetic. Does not know: experts, files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_kernels.error_feedback import ErrorFeedback, refine_with_feedback
from edge_kernels.quantization import BLOCK, quantize

GROUP = 128
PLANE_BYTES = 32  # of a group
FINE_BYTES = 64  # of a group
SCALE_BYTES = 2 * (GROUP // BLOCK)  # of a group
PLANE_BITS = (2, 4, 8)  # of a weight, of which one plane, two, three are there
MIDDLE = 1.5  # of the four codes that share their high bits
FINE_STEPS = (
    7  # in a step of the codes: 7 * 15 + 15 = 120 is the highest whole code, two products fit 16 bits
)
_FINE_ZERO = 8

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class NestedMatrix:
    """[N, K] in G = ceil(K / 128) groups a row."""

    high: U8  # [N, G, 32]
    low: U8  # [N, G, 32]
    scales: U8  # [N, G, 8]: bfloat16, little-endian
    fine: U8 | None = None  # [N, G, 64], or None: two planes

    @property
    def bits(self) -> int:
        return PLANE_BITS[1 if self.fine is None else 2]


def quantize_nested(
    weights: F32, *, bits: int = 4, importance: F32 | None = None, search: bool = True
) -> NestedMatrix:
    """float32 [N, K] in two planes (4 bits) or three (8); options and errors of `quantize`, whose int4 codes the first
    two have."""
    quantized = quantize(weights, "int4", importance=importance, search=search)
    nested = nest(quantized.data, quantized.scales)
    return nested if bits == nested.bits else refine(nested, weights)


def nest(data: U8, scales: F32) -> NestedMatrix:
    """int4 codes [N, B, 16] and scales [N, B] in planes."""
    rows, blocks = scales.shape
    groups = -(-blocks * BLOCK // GROUP)
    codes = np.full((rows, groups * GROUP), 8, np.uint8)
    codes[:, : blocks * BLOCK] = np.stack((data & 15, data >> 4), axis=-1).reshape(rows, blocks * BLOCK)
    padded = np.zeros((rows, groups * GROUP // BLOCK), np.float32)
    padded[:, :blocks] = scales
    grouped = codes.reshape(rows, groups, GROUP)
    return NestedMatrix(
        _pack(grouped >> np.uint8(2)),
        _pack(grouped & np.uint8(3)),
        _bfloat16(padded).reshape(rows, groups, -1),
    )


def refine(matrix: NestedMatrix, weights: F32, feedback: ErrorFeedback | None = None) -> NestedMatrix:
    """Two planes, and a third that brings them as near to the float32 [N, K] as it can; with `feedback` their product
    with the inputs that it knows."""
    rows, columns = weights.shape
    blocks = -(-columns // BLOCK)
    base = dequantize_nested(matrix, 4, columns)
    steps = np.ascontiguousarray(nested_scales(matrix)[:, :blocks]) / np.float32(FINE_STEPS)
    codes = np.full((rows, matrix.high.shape[1] * GROUP), _FINE_ZERO, np.uint8)
    if feedback is None:
        by_column = steps.repeat(BLOCK, -1)[:, :columns]
        units = np.divide(weights - base, by_column, out=np.zeros_like(base), where=by_column != 0)
        codes[:, :columns] = np.clip(np.rint(units), -_FINE_ZERO, _FINE_ZERO - 1) + _FINE_ZERO
    else:
        codes[:, :columns] = refine_with_feedback(weights, feedback, base, steps)
    grouped = codes.reshape(*matrix.high.shape[:2], GROUP)
    fine: U8 = grouped[..., 0::2] | grouped[..., 1::2] << np.uint8(4)
    return replace(matrix, fine=np.ascontiguousarray(fine))


def dequantize_nested(matrix: NestedMatrix, bits: int, columns: int) -> F32:
    """The float32 [N, columns] that the first plane (2 bits), two (4) or all three (8) stand for."""
    if bits not in PLANE_BITS or bits > matrix.bits:
        known = " or ".join(str(each) for each in PLANE_BITS if each <= matrix.bits)
        raise ValueError(f"nested weights are read at {known} bits, not {bits}")
    codes = 4 * _unpack(matrix.high).astype(np.float32)
    codes += np.float32(MIDDLE) if bits == PLANE_BITS[0] else _unpack(matrix.low)
    if matrix.fine is not None and bits == PLANE_BITS[2]:
        units = _unpack_fine(matrix.fine).astype(np.float32) - np.float32(_FINE_ZERO)
        codes += units / np.float32(FINE_STEPS)
    rows, groups = matrix.high.shape[:2]
    scales = nested_scales(matrix).reshape(rows, groups, GROUP // BLOCK).repeat(BLOCK, -1)
    values: F32 = ((codes - np.float32(8)) * scales).reshape(rows, -1)[:, :columns]
    return np.ascontiguousarray(values)


def nested_scales(matrix: NestedMatrix) -> F32:
    """float32 [N, 4 G]."""
    halves = np.ascontiguousarray(matrix.scales).view("<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(len(matrix.scales), -1)


def _pack(codes: U8) -> U8:
    """[N, G, 128] of 2 bits to [N, G, 32] bytes."""
    even, odd = codes[..., 0::2], codes[..., 1::2]
    half = PLANE_BYTES
    packed: U8 = (
        even[..., :half] | even[..., half:] << 2 | odd[..., :half] << 4 | odd[..., half:] << 6
    ).astype(np.uint8)
    return np.ascontiguousarray(packed)


def _unpack(plane: U8) -> U8:
    codes = np.empty((*plane.shape[:2], GROUP), np.uint8)
    codes[..., 0::2] = np.concatenate((plane & 3, plane >> 2 & 3), axis=-1)
    codes[..., 1::2] = np.concatenate((plane >> 4 & 3, plane >> 6), axis=-1)
    return codes


def _unpack_fine(plane: U8) -> U8:
    codes = np.empty((*plane.shape[:2], GROUP), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = plane & 15, plane >> 4
    return codes


def _bfloat16(values: F32) -> U8:
    """Rounded to nearest, ties to even, as little-endian bytes. Values are finite."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.ascontiguousarray(rounded.astype("<u2")).view(np.uint8)
