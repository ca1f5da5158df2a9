"""What a hidden row is between two layers: full precision, fp16, or 8 bits a value with one scale a row.

A class that is not fp32 rounds the residual at every layer boundary, cut or not, so that a result never depends on
where the cuts are. What is rounded once stays as it is when it is rounded again, so a frame carries it exactly.

Knows: formats, rounding, bytes of a frame. Does not know: layers, stages, links.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EngineError

Float32 = NDArray[np.float32]

FP32, FP16, INT8 = "fp32", "fp16", "int8"
WIRES = (FP32, FP16, INT8)

_LITTLE_FLOAT = np.dtype("<f4")
_LEVELS = np.float32(127)
# 127 times a scale must be exact in fp32, or rounding twice would not be rounding once: a scale has 16 bits.
_DROPPED_BITS = np.uint32(0xFF)
_LEAST_SCALE = np.float32(2.0**-100)


def check_wire(wire: str) -> str:
    if wire not in WIRES:
        raise EngineError(f"there is no wire format {wire!r}", hint=f"choose one of {', '.join(WIRES)}")
    return wire


def row_bytes(wire: str, hidden_size: int) -> int:
    """Of one row in a frame."""
    return {FP32: 4 * hidden_size, FP16: 2 * hidden_size, INT8: hidden_size + 4}[wire]


def rounded(rows: Float32, wire: str) -> Float32:
    """Rows [R, E] as the next layer gets them. Raises EngineError where a format cannot hold a value."""
    if wire == FP32:
        return rows
    if wire == FP16:
        return _half(rows).astype(np.float32)
    return _from_levels(*_levels(rows))


def packed(rows: Float32, wire: str) -> memoryview:
    """The frame of rows that are `rounded` already: fp32 as they lie, no copy; int8 all scales first."""
    if wire == FP32:
        return np.ascontiguousarray(rows, _LITTLE_FLOAT).data.cast("B")
    if wire == FP16:
        return _half(rows).astype("<f2", copy=False).data.cast("B")
    levels, scales = _levels(rows)
    return memoryview(scales.astype("<f4", copy=False).tobytes() + levels.tobytes())


def unpacked(frame: memoryview, wire: str, count: int, hidden_size: int) -> Float32 | None:
    """`count` rows out of a frame, fp32 where they lie; None where the frame has another size or is not of rows."""
    if frame.nbytes != count * row_bytes(wire, hidden_size):
        return None
    shape = (count, hidden_size)
    if wire == FP32:
        rows = np.frombuffer(frame, _LITTLE_FLOAT).reshape(shape)
        return rows if rows.flags.aligned else rows.copy()  # small frames lie wherever the link put them
    if wire == FP16:
        return np.frombuffer(frame, np.dtype("<f2")).reshape(shape).astype(np.float32)
    scales = np.frombuffer(frame, np.dtype("<f4"), count).reshape(count, 1)
    return _from_levels(np.frombuffer(frame, np.int8, offset=4 * count).reshape(shape), scales)


def _half(rows: Float32) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16)
    if not np.isfinite(half).all():
        raise _too_large(FP16, rows)
    return half


def _levels(rows: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Levels [R, E] and scales [R, 1]: a row's largest value becomes 127 or -127."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all() or largest.max(initial=0) > np.finfo(np.float32).max / 2:
        raise _too_large(INT8, rows)
    scales = np.maximum(largest / _LEVELS, _LEAST_SCALE)
    scales = ((scales.view(np.uint32) + _DROPPED_BITS) & ~_DROPPED_BITS).view(np.float32)  # upwards
    return np.rint(rows / scales).astype(np.int8), scales


def _from_levels(levels: NDArray[np.int8], scales: Float32) -> Float32:
    return levels.astype(np.float32) * scales


def _too_large(wire: str, rows: Float32) -> EngineError:
    finite = np.abs(rows[np.isfinite(rows)]).max(initial=0)
    what = f"{finite:g}" if np.isfinite(rows).all() else "a value that is not a number"
    return EngineError(
        f"a hidden row holds {what}, which the wire format {wire} has no room for; this model needs --wire fp32",
        hint="start the coordinator with --wire fp32",
        code="wire_overflow",
    )
