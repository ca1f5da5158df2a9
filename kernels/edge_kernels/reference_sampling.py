"""The sampler's specification in NumPy: keyed noise and filters, the same bits on every machine (docs/noise.md).

Only 32-bit integer operations and the float64 operations + - * / are used, in the order written; no library
logarithm or exponential, whose last bits differ between machines.

Knows: arithmetic. Does not know: penalties, sequences, or who holds the seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
LN2_HIGH = float.fromhex(
    "0x1.62e42fee00000p-1"
)  # the upper 32 bits of ln 2: e * LN2_HIGH is exact for |e| < 2^11
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
LOG2_E = float.fromhex("0x1.71547652b82fep+0")
ROUNDER = 1.5 * 2.0**52  # adding and subtracting it rounds to an integer, ties to even
LOG_TERMS = 11  # atanh series: 1, 1/3, ... 1/21
EXP_TERMS = 14  # Taylor series: 1/0! ... 1/13!
NEGLIGIBLE = -708.0  # exp below this is 0


def threefry(key: tuple[int, int], c0: Any, c1: Any) -> tuple[U32, U32]:
    """Threefry-2x32 with 20 rounds, as in Random123: two words for each counter (c0, c1)."""
    words = (key[0], key[1], PARITY ^ key[0] ^ key[1])
    x0 = np.atleast_1d(c0).astype(np.uint32) + np.uint32(words[0])
    x1 = np.atleast_1d(c1).astype(np.uint32) + np.uint32(words[1])
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
        x0 = x0 + np.uint32(words[(group + 1) % 3])
        x1 = x1 + np.uint32((words[(group + 2) % 3] + group + 1) & 0xFFFFFFFF)
    return x0, x1


def uniform(seed: int, position: int, ids: U32) -> F64:
    """(2k + 1) / 2^53 with k the upper 52 bits of the two words: never 0, never 1, exact."""
    x0, x1 = threefry(split_seed(seed), np.full(ids.shape, position, np.uint32), ids)
    k = (x0.astype(np.uint64) << np.uint64(20)) | (x1.astype(np.uint64) >> np.uint64(12))
    odd: U64 = k * np.uint64(2) + np.uint64(1)
    return odd.astype(np.float64) * 2.0**-53


def split_seed(seed: int) -> tuple[int, int]:
    """The key: low word, high word."""
    return seed & 0xFFFFFFFF, seed >> 32


def gumbel_noise(seed: int, position: int, ids: U32) -> F64:
    return -log(-log(uniform(seed, position, ids)))


def log(x: F64) -> F64:
    """Natural logarithm of positive normal float64 values.

    x = m * 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1).
    """
    bits = x.view(np.uint64)
    e = (bits >> np.uint64(52)).astype(np.int64) - 1023
    m = ((bits & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(0x3FF0000000000000)).view(np.float64)
    big = m >= float.fromhex("0x1.6a09e667f3bcdp+0")
    m = np.where(big, m * 0.5, m)
    exponent = np.where(big, e + 1, e).astype(np.float64)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = np.full_like(x, 1.0 / (2 * LOG_TERMS - 1))
    for term in range(LOG_TERMS - 2, -1, -1):
        series = series * z + 1.0 / (2 * term + 1)
    return exponent * LN2_HIGH + ((s + s) * series + exponent * LN2_LOW)


def exp(x: F64) -> F64:
    """e^x for x <= 0; 0 below -708."""
    kept = np.where(x < NEGLIGIBLE, 0.0, x)
    n = (kept * LOG2_E + ROUNDER) - ROUNDER
    r = (kept - n * LN2_HIGH) - n * LN2_LOW
    factorials = [1.0]
    for term in range(1, EXP_TERMS):
        factorials.append(factorials[-1] * term)
    series = np.full_like(x, 1.0 / factorials[-1])
    for term in range(EXP_TERMS - 2, -1, -1):
        series = series * r + 1.0 / factorials[term]
    power = ((n.astype(np.int64) + 1023) << 52).view(np.float64)
    return np.where(x < NEGLIGIBLE, 0.0, series * power)


def sequential_sum(values: F64) -> float:
    """Left to right, one at a time (`np.sum` adds in pairs)."""
    return float(np.add.accumulate(values)[-1])


def survivors(logits: F64, *, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[U32, F64]:
    """Ids (ascending) that the filters keep and their d = (logit - largest) / temperature."""
    d = (logits - logits.max()) / temperature
    weights = exp(d)
    order = np.lexsort((np.arange(len(d)), -d))  # largest first, ties to the lower id
    kept = order[weights[order] > 0.0]
    if top_k:
        kept = kept[:top_k]
    if top_p < 1.0:
        total = sequential_sum(weights[np.sort(kept)])
        reached = np.add.accumulate(weights[kept]) >= top_p * total
        kept = kept[: int(np.argmax(reached)) + 1] if reached.any() else kept
    if min_p > 0.0:
        kept = kept[weights[kept] >= min_p]
    ids = np.sort(kept)
    return ids.astype(np.uint32), d[ids]


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
    """The id with the largest d + noise among those the filters keep; ties to the lowest id."""
    if temperature == 0.0:
        return int(np.argmax(logits))
    ids, d = survivors(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return int(ids[np.argmax(d + gumbel_noise(seed, position, ids))])


def log_probabilities(logits: F64, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural-log probability of `chosen`, and the `top` most likely ids with theirs (ties to the lower id)."""
    largest = logits.max()
    normalizer = float(log(np.array([sequential_sum(exp(logits - largest))]))[0])
    best = np.lexsort((np.arange(len(logits)), -logits))[:top]
    return float(logits[chosen] - largest) - normalizer, [
        (int(i), float(logits[i] - largest) - normalizer) for i in best
    ]
