"""Block quantization of weight matrices, in the layout ONNX Runtime's MatMulNBits reads.

A row of K weights is cut into blocks of 32. A block is unsigned codes (8 bits each, or 4 bits, low nibble first)
and one float32 scale; weight = (code - zero point) * scale, zero point 2^(bits - 1). A last block that is not full
is padded with the zero point.

Knows: the layout and how to choose scales. Does not know: which matrices of a model are quantized, or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
_CHUNK_WEIGHTS = 1 << 20  # weights searched at a time: bounds memory at some tens of MiB

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Codes and scales of a matrix [N, K]; B = ceil(K / 32) blocks a row."""

    data: U8  # [N, B, 32 * bits / 8]
    scales: F32  # [N, B]


def quantize(
    weights: F32, format: str, *, importance: F32 | None = None, search: bool = True
) -> QuantizedMatrix:
    """Quantize float32 [N, K] to "int8" or "int4", with the scales that give the least squared error found.

    `importance` float32 [K] weighs the error of each input channel: the mean square of the activations it meets.
    Without `search` one scale is tried per block: twenty times faster and a little worse.
    """
    bits = _bits(format)
    check_weights(weights, importance)
    rows, columns = weights.shape
    blocks = -(-columns // BLOCK)
    codes = np.empty((rows, blocks, BLOCK), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    error_weights = _padded(np.ones((1, columns)) if importance is None else importance[None], blocks)
    step = max(1, _CHUNK_WEIGHTS // (blocks * BLOCK))
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        codes[chunk], scales[chunk] = _quantize_blocks(
            _padded(weights[chunk], blocks),
            error_weights,
            bits,
            _divisors(bits) if search else (-float(1 << (bits - 1)),),
        )
    return QuantizedMatrix(packed_codes(codes, bits), scales)


def best_scales(weights: F32, importance: F32, bits: int) -> F32:
    """Of one block of columns, [N, up to 32]: the scales [N] that `quantize` would choose."""
    return _quantize_blocks(_padded(weights, 1), _padded(importance[None], 1), bits, _divisors(bits))[1][:, 0]


def packed_codes(codes: U8, bits: int) -> U8:
    """[N, B, 32], one code a byte, as `QuantizedMatrix.data`."""
    return np.ascontiguousarray(codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4))


def check_weights(weights: F32, importance: F32 | None = None) -> None:
    """Raises ValueError for what can't be quantized."""
    if weights.ndim != 2 or weights.size == 0:
        raise ValueError(f"quantize needs a matrix [N, K] that is not empty, not shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("quantize needs finite weights")
    columns = weights.shape[1]
    if importance is not None and (importance.shape != (columns,) or not (importance >= 0).all()):
        raise ValueError(f"importance needs {columns} values of at least 0, one for each input channel")


def dequantize(quantized: QuantizedMatrix, format: str, columns: int) -> F32:
    """The float32 [N, columns] that the codes stand for."""
    bits = _bits(format)
    blocks = -(-columns // BLOCK)
    rows = quantized.data.shape[0]
    if quantized.data.shape != (rows, blocks, BLOCK * bits // 8) or quantized.scales.shape != (rows, blocks):
        raise ValueError(
            f"{format} of {columns} columns needs data [{rows}, {blocks}, {BLOCK * bits // 8}] and scales "
            f"[{rows}, {blocks}], not {quantized.data.shape} and {quantized.scales.shape}"
        )
    codes = quantized.data
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(rows, blocks, BLOCK)
    values = (codes.astype(np.float32) - np.float32(1 << (bits - 1))) * quantized.scales[..., None]
    return np.ascontiguousarray(values.reshape(rows, blocks * BLOCK)[:, :columns])


def _bits(format: str) -> int:
    if format not in BITS:
        raise ValueError(f"unknown weight format {format!r}: choose int8 or int4")
    return BITS[format]


def _padded(rows: NDArray[np.floating], blocks: int) -> F32:
    """[N, K] -> [N, B, 32], zeros where the last block is not full."""
    padded = np.zeros((rows.shape[0], blocks * BLOCK), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(rows.shape[0], blocks, BLOCK)


def _quantize_blocks(
    blocks: F32, error_weights: F32, bits: int, divisors: tuple[float, ...]
) -> tuple[U8, F32]:
    """Codes and scales of [N, B, 32]: try divisors of the largest weight, refit each by least squares, keep the best.

    Codes reach one step further down (-8) than up (7), so the largest weight is put on the negative side by the sign of
    the scale in half of the candidates.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    weighted = blocks * error_weights
    best_codes = np.zeros(blocks.shape, np.float32)
    best_scales = np.zeros(blocks.shape[:-1], np.float32)
    best_gain = np.zeros(blocks.shape[:-1], np.float32)  # squared error removed, against all codes zero
    for divisor in divisors:
        inverse = np.divide(np.float32(divisor), largest, out=np.zeros_like(largest), where=largest != 0)
        for _ in range(2):  # the refitted scale rounds some weights differently: once more around
            codes = np.clip(np.rint(blocks * inverse), low, high)
            product = (weighted * codes).sum(-1)
            square = (codes * codes * error_weights).sum(-1)
            fits = square > 0
            scales = np.divide(product, square, out=np.zeros_like(product), where=fits)
            gain = scales * product
            better = gain > best_gain
            best_gain = np.where(better, gain, best_gain)
            best_scales = np.where(better, scales, best_scales)
            best_codes[better] = codes[better]
            inverse = np.divide(
                np.float32(1), scales[..., None], out=np.zeros_like(largest), where=scales[..., None] != 0
            )
    return (best_codes - low).astype(np.uint8), best_scales.astype(np.float32)


def _divisors(bits: int) -> tuple[float, ...]:
    """The codes (fractional, signed) that the largest weight is tried at."""
    if bits == 8:
        return (127.0, -128.0)
    steps = [6.2 + 0.3 * i for i in range(11)]  # 6.2 ... 9.2: past 8 clips the largest weight
    return tuple(steps) + tuple(-step for step in steps)
