"""Bit-nested matrices: two planes of 2 bits a weight; the first alone is a usable matrix, both are an int4 one.

Codes are those that `quantize` gives for int4, scales are rounded to bfloat16 and belong to the first plane:

    high plane: code >> 2    low plane: code & 3    weight = (code - 8) * scale

Of the high plane alone a weight is (4 * (code >> 2) + 1.5 - 8) * scale: the middle of the four codes it may be.

A row of K weights is cut into groups of 128, the last one padded with zeros of scale 0; a group is 32 bytes of each
plane and four scales, one for each block of 32. Byte j of a group holds four weights, lowest bits first: of the group's
even columns the j-th and the (j + 32)-th, then of its odd columns the same two.

Knows: that layout and its arithmetic. Does not know: experts, files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels.quantization import BLOCK, quantize

GROUP = 128
PLANE_BYTES = 32  # of a group
SCALE_BYTES = 2 * (GROUP // BLOCK)  # of a group
START_BITS, FULL_BITS = 2, 4
MIDDLE = 1.5  # of the four codes that share their high bits

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class NestedMatrix:
    """[N, K] in G = ceil(K / 128) groups a row."""

    high: U8  # [N, G, 32]
    low: U8  # [N, G, 32]
    scales: U8  # [N, G, 8]: bfloat16, little-endian


def quantize_nested(weights: F32, *, importance: F32 | None = None, search: bool = True) -> NestedMatrix:
    """float32 [N, K]; options and errors of `quantize`, whose int4 codes these are."""
    quantized = quantize(weights, "int4", importance=importance, search=search)
    return nest(quantized.data, quantized.scales)


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


def dequantize_nested(matrix: NestedMatrix, bits: int, columns: int) -> F32:
    """The float32 [N, columns] that the first plane (2 bits), or both (4), stand for."""
    if bits not in (START_BITS, FULL_BITS):
        raise ValueError(f"nested weights are read at {START_BITS} or {FULL_BITS} bits, not {bits}")
    codes = 4 * _unpack(matrix.high).astype(np.float32)
    codes += np.float32(MIDDLE) if bits == START_BITS else _unpack(matrix.low)
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


def _bfloat16(values: F32) -> U8:
    """Rounded to nearest, ties to even, as little-endian bytes. Values are finite."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.ascontiguousarray(rounded.astype("<u2")).view(np.uint8)
