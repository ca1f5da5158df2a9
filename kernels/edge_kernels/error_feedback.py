"""int4 rounding that makes up for each column's error in the columns after it (GPTQ, arXiv 2210.17323).

What counts is the product with the inputs a weight meets, and those are correlated: a weight that was rounded up is
made good by its neighbours. With H the inputs' second moments and U upper triangular, inverse(H) = U^T U, column j is
rounded to q, and the columns behind it move by -(w - q) / U[j, j] * U[j, j + 1:].

Scales are chosen for a block when its turn comes, of weights that have moved already. Columns are treated in stretches
of STRETCH, as if those of different ones had nothing to do with each other: time and memory grow with its square.

Where every weight has a value near by that it can't leave far (the planes before a third one, `edge_kernels.nested`),
the same is done with codes around that value.

Knows: that arithmetic. Does not know: where inputs come from, or which matrices are rounded like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels.quantization import (
    BLOCK,
    F32,
    U8,
    QuantizedMatrix,
    best_scales,
    check_weights,
    packed_codes,
)

STRETCH = 1024  # columns
PRIOR_ROWS = 64  # what "columns have nothing to do with each other" counts for
DAMPING = 0.01  # of the mean square, added to all: a column that never moved must not take all errors
_ZERO = 8  # the code that stands for 0
_LOW, _HIGH = -8, 7


@dataclass(frozen=True, slots=True, eq=False)
class ErrorFeedback:
    """What the inputs say about a weight's K columns."""

    importance: F32  # [K]: mean squares
    factors: tuple[F32, ...]  # of each stretch: U [C, C]

    @classmethod
    def of(cls, inputs: F32, importance: F32) -> ErrorFeedback:
        """`inputs` [R, K], R may be 0; `importance` [K], above 0: mean squares of these and perhaps of more rows."""
        if inputs.ndim != 2 or importance.shape != inputs.shape[1:] or not (importance > 0).all():
            raise ValueError("error feedback needs inputs [R, K] and K importances above 0")
        starts = range(0, len(importance), STRETCH)
        stretches = (slice(start, start + STRETCH) for start in starts)
        return cls(importance, tuple(_factor(inputs[:, each], importance[each]) for each in stretches))


def quantize_with_feedback(weights: F32, feedback: ErrorFeedback) -> QuantizedMatrix:
    """float32 [N, K] as int4. Rows don't depend on each other. Raises ValueError as `quantize` does."""
    check_weights(weights, feedback.importance)
    pieces = []
    for index, factor in enumerate(feedback.factors):
        columns = slice(index * STRETCH, index * STRETCH + len(factor))
        pieces.append(_stretch(weights[:, columns], feedback.importance[columns], factor))
    codes = np.concatenate([codes for codes, _ in pieces], axis=1)
    scales = np.concatenate([scales for _, scales in pieces], axis=1)
    return QuantizedMatrix(packed_codes(codes, 4), np.ascontiguousarray(scales))


def refine_with_feedback(weights: F32, feedback: ErrorFeedback, base: F32, steps: F32) -> U8:
    """Codes [N, K], so that base + (code - 8) * step serves like `weights`. float32 [N, K] both; steps [N, B]."""
    check_weights(weights, feedback.importance)
    pieces = []
    for index, factor in enumerate(feedback.factors):
        columns = slice(index * STRETCH, index * STRETCH + len(factor))
        blocks = slice(index * STRETCH // BLOCK, index * STRETCH // BLOCK + -(-len(factor) // BLOCK))
        around = np.ascontiguousarray(base[:, columns].T), np.ascontiguousarray(steps[:, blocks].T)
        codes, _ = _stretch(weights[:, columns], feedback.importance[columns], factor, around)
        pieces.append(codes.reshape(len(weights), -1)[:, : len(factor)])
    return np.concatenate(pieces, axis=1)


def _factor(inputs: F32, importance: F32) -> F32:
    """U: correlations as far as there are rows to believe them, mean squares on the diagonal."""
    rows = len(inputs)
    x = inputs.astype(np.float64)
    moments: NDArray[np.float64] = x.T @ x / (rows + PRIOR_ROWS)
    squares = importance.astype(np.float64)
    diagonal = np.diag_indices(len(squares))
    moments[diagonal] = np.maximum(squares, moments[diagonal]) + DAMPING * squares.mean()
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(moments)).T, np.float32)


def _stretch(
    weights: F32, importance: F32, factor: F32, around: tuple[F32, F32] | None = None
) -> tuple[U8, F32]:
    """Codes [N, B, 32] and scales [N, B] of weights [N, C]; `around`: values [C, N] that codes are added to, and scales
    [B, N]."""
    rows, columns = weights.shape
    blocks = -(-columns // BLOCK)
    codes = np.full((blocks, BLOCK, rows), _ZERO, np.uint8)
    scales = np.empty((blocks, rows), np.float32)
    turned = weights.T.copy()  # what is worked on, column after column, lies in one piece
    for block, start in enumerate(range(0, columns, BLOCK)):
        stop = min(start + BLOCK, columns)
        inside = slice(start, stop)
        base = np.zeros_like(turned[inside])
        if around is None:
            scales[block] = best_scales(np.ascontiguousarray(turned[inside].T), importance[inside], 4)
        else:
            base, scales[block] = around[0][inside], around[1][block]
        errors = _round(turned[inside], scales[block], factor[inside, inside], codes[block], base)
        turned[stop:] -= factor[inside, stop:].T @ errors
    return codes.transpose(2, 0, 1), scales.T


def _round(turned: F32, scales: F32, factor: F32, codes: U8, base: F32) -> F32:
    """One block [up to 32, N], column by column. Fills `codes`; returns errors as the columns behind must take them."""
    errors = np.empty_like(turned)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    for column, wanted in enumerate(turned):
        own = wanted - base[column]
        rounded = np.clip(np.rint(own * inverse), _LOW, _HIGH)
        codes[column] = (rounded + _ZERO).astype(np.uint8)
        errors[column] = (own - rounded * scales) / factor[column, column]
        turned[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return errors
