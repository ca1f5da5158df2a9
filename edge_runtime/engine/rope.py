"""Cosines and sines of rotary embeddings, the same bits on every machine.

Libraries' own cos and sin differ in the last bit between processors and versions; the table here uses only float64
additions and multiplications in a fixed order, which IEEE 754 defines exactly.
Knows: angles. Does not know: which rows are rotated, or how halves of a head pair up.
"""

from __future__ import annotations

from math import factorial

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import Rope

# pi/2 in three parts of 33 bits or fewer: k * part is exact for the k that occur (|angle| < 2^20).
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN_TERMS = tuple((-1.0) ** n / factorial(2 * n + 1) for n in range(9))
_COS_TERMS = tuple((-1.0) ** n / factorial(2 * n) for n in range(9))

Float64 = NDArray[np.float64]


def cos_sin(angles: Float64) -> tuple[Float64, Float64]:
    """Within 1e-15 of the true values for |angle| < 2^20."""
    quarter = np.rint(angles * (2.0 / np.pi))
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarter * part
    cos, sin = _polynomial(_COS_TERMS, rest * rest), rest * _polynomial(_SIN_TERMS, rest * rest)
    turn = quarter.astype(np.int64) % 4
    return (
        np.choose(turn, (cos, -sin, -cos, sin)),
        np.choose(turn, (sin, cos, -sin, -cos)),
    )


def _polynomial(terms: tuple[float, ...], x: Float64) -> Float64:
    total = np.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + term
    return total


def rope_tables(rope: Rope, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin f32[positions, len(inverse_frequencies)].

    The angle is rounded to float32 first, as checkpoints were trained with.
    """
    frequencies = np.asarray(rope.inverse_frequencies, np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
    cos, sin = cos_sin(angles.astype(np.float64))
    return (cos * rope.scale).astype(np.float32), (sin * rope.scale).astype(np.float32)
