"""From logits to one token id, the same on every machine: filters, keyed Gumbel noise, argmax (docs/noise.md).

Noise is a pure function of (seed, absolute position, token id), so a token does not depend on how many were sampled
before, by whom, or in which batch.

Knows: one row of logits at a time. Does not know: penalties, sequences, stop conditions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_kernels import reference_sampling as reference

F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]


def choice_seed(seed: int, choice: int) -> int:
    """Seed of choice `choice` of one request: choice 0 keeps the request's own."""
    if not (0 <= seed < 2**64 and 0 <= choice < 2**32):
        raise ValueError("a seed must fit 64 bits and a choice 32 bits, both unsigned")
    if choice == 0:
        return seed
    # No vocabulary has an id 2^32 - 1, so this counter never meets one that makes noise.
    low, high = reference.threefry(reference.split_seed(seed), choice, 0xFFFFFFFF)
    return int(low[0]) | int(high[0]) << 32


def threefry(key: tuple[int, int], c0: U32, c1: U32) -> tuple[U32, U32]:
    """Threefry-2x32-20 of each counter (c0, c1)."""
    return reference.threefry(key, c0, c1)


def gumbel_noise(seed: int, position: int, ids: U32) -> F64:
    """Noise of each token id at an absolute position."""
    return reference.gumbel_noise(seed, position, ids)


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
    return reference.sample(
        _checked(logits),
        seed=seed,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def log_probabilities(logits: F64, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural-log probability of `chosen`, and the `top` most likely ids with theirs."""
    return reference.log_probabilities(_checked(logits), chosen, top)


def _checked(logits: F64) -> F64:
    if logits.ndim != 1 or logits.size == 0 or np.isnan(logits).any() or not np.isfinite(logits.max()):
        raise ValueError("sampling needs one row of logits, none of them NaN or +inf, and one that is finite")
    return logits.astype(np.float64)
