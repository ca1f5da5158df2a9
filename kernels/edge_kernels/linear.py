"""Dense products: y = x W^T (+ bias), for fp32 weights and for int8 and int4 ones in blocks of 32.

Quantized weights come in the layout of `edge_kernels.quantization`. All are packed once into the order the kernel reads
them: sixteen outputs side by side, quantized ones with their scales as half floats times one power of two per matrix.
Quantized weights meet activations as int8, rounded in blocks of 32 (largest / 127). Each output has one accumulator,
to which block after block adds the exact integer product times both scales, fused; fp32 ones run column after column.
So a row's bits depend on no other row, thread or instruction set.

Knows: matrices and rows. Does not know: bundles, operations between products, or who owns the bytes packed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels._native import PackedMatrix
from edge_kernels.quantization import BITS

__all__ = ["PackedMatrix", "linear", "pack", "pack_fp32", "packed_bytes"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

TILE_OUTPUTS = 16
BLOCK = 32


def pack(data: U8, scales: F32, columns: int, *, threads: int = 1) -> PackedMatrix:
    """A quantized matrix: data [N, blocks, 32 * bits / 8] and scales [N, blocks] are copied, and needed no more."""
    return PackedMatrix(
        np.ascontiguousarray(data, np.uint8), np.ascontiguousarray(scales, np.float32), columns, threads
    )


def pack_fp32(weights: F32, *, threads: int = 1) -> PackedMatrix:
    """Weights [N, K] are copied, and needed no more."""
    return PackedMatrix(np.ascontiguousarray(weights, np.float32), threads)


def packed_bytes(format: str, outputs: int, columns: int) -> int:
    """What a matrix takes once packed."""
    tiles = -(-outputs // TILE_OUTPUTS)
    if format == "fp32":
        return tiles * TILE_OUTPUTS * columns * 4
    pairs = -(-columns // (2 * BLOCK))
    return tiles * pairs * 2 * TILE_OUTPUTS * (BLOCK * BITS[format] // 8 + 2)


def linear(x: F32, matrix: PackedMatrix, bias: F32 | None = None, *, threads: int = 1) -> F32:
    """Rows [R, K] times a packed matrix [N, K]: [R, N]."""
    program = _native.Program([matrix.columns], [matrix.outputs])
    source = 0
    if matrix.bits != 32:
        source = program.quantized(matrix.columns, matrix.bits)
        program.quantize(0, source)
    program.linear(matrix, source, 1, None if bias is None else np.ascontiguousarray(bias, np.float32))
    y = np.empty((len(x), matrix.outputs), np.float32)
    program.run([np.ascontiguousarray(x, np.float32)], [y], threads)
    return y
