"""From logits to one token id, the same on every machine: filters, keyed Gumbel noise, argmax (docs/noise.md).

Noise is a pure function of (seed, absolute position, token id), so a token does not depend on how many were sampled
before, by whom, or in which batch.

Knows: one row of logits at a time. Does not know: penalties, sequences, stop conditions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native

F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]


def choice_seed(seed: int, choice: int) -> int:
    """Seed of choice `choice` of one request: choice 0 keeps the request's own."""
    if not (0 <= seed < 2**64 and 0 <= choice < 2**32):
        raise ValueError("a seed must fit 64 bits and a choice 32 bits, both unsigned")
    if choice == 0:
        return seed
    # No vocabulary has an id 2^32 - 1, so this counter never meets one that makes noise.
    low, high = threefry(
        (seed & 0xFFFFFFFF, seed >> 32), np.array([choice], np.uint32), np.array([2**32 - 1], np.uint32)
    )
    return int(low[0]) | int(high[0]) << 32


def threefry(key: tuple[int, int], c0: U32, c1: U32) -> tuple[U32, U32]:
    """Threefry-2x32-20 of each counter (c0, c1)."""
    x0, x1 = np.empty(c0.shape, np.uint32), np.empty(c0.shape, np.uint32)
    _native.threefry(*key, np.ascontiguousarray(c0, np.uint32), np.ascontiguousarray(c1, np.uint32), x0, x1)
    return x0, x1


def gumbel_noise(seed: int, position: int, ids: U32) -> F64:
    """Noise of each token id at an absolute position."""
    _check_key(seed, position)
    noise = np.empty(ids.shape, np.float64)
    _native.gumbel_noise(seed, position, np.ascontiguousarray(ids, np.uint32), noise)
    return noise


def sample(
    logits: F64,
    *,
    seed: int,
    position: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One id from penalised logits [V]: temperature, top-k, top-p, min-p, then argmax of log p + noise.

    `position` is the absolute position the new token will have. Temperature 0: argmax, no filters, no noise. Every tie
    goes to the lowest id.
    """
    _check_key(seed, position)
    return _native.sample(_row(logits), seed, position, temperature, top_k, top_p, min_p)


def log_probabilities(logits: F64, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural-log probability of `chosen`, and the `top` most likely ids with theirs."""
    if not (0 <= chosen < logits.size and top >= 0):
        raise ValueError(
            "log-probabilities need a chosen id inside the vocabulary, and a count of at least 0"
        )
    return _native.log_probabilities(_row(logits), chosen, top)


def _row(logits: F64) -> F64:
    if logits.ndim != 1:
        raise ValueError(f"sampling takes one row of logits, not shape {logits.shape}")
    return np.ascontiguousarray(logits, np.float64)


def _check_key(seed: int, position: int) -> None:
    if not (0 <= seed < 2**64 and 0 <= position < 2**32):
        raise ValueError("a seed must fit 64 bits and a position 32 bits, both unsigned")
