"""What experts on flash cost: how many are missed, and how fast a token can be at best.

Knows: the limit formula and hit rates to expect. Does not know: caches, clocks, or where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

# Share of a model's experts in memory -> share of a token's experts found there: of long mixed sessions of models with
# 60 to 512 experts a layer. Single short prompts do better, models with few tokens per expert worse.
_EXPECTED = (
    (0.0, 0.0),
    (0.05, 0.25),
    (0.125, 0.5),
    (0.25, 0.72),
    (0.375, 0.82),
    (0.5, 0.89),
    (0.75, 0.96),
    (1.0, 1.0),
)


def expected_hit_rate(share: float) -> float:
    """Before anything was measured. `share`: of the expert bytes that fit into the cache."""
    share = min(1.0, max(0.0, share))
    for (low, low_rate), (high, high_rate) in pairwise(_EXPECTED):
        if share <= high:
            return low_rate + (share - low) / (high - low) * (high_rate - low_rate)
    return 1.0


def missed_seconds(cycle_bytes: int, hit_rate: float, flash_bytes_per_second: float) -> float:
    """Reading what one token does not find in memory."""
    return cycle_bytes * (1.0 - hit_rate) / flash_bytes_per_second


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer of one token, as it happened. Seconds are of computing."""

    dense_seconds: float
    hit_seconds: float  # of all experts that were in memory
    last_miss_seconds: float  # of one expert: the last to arrive can only be computed then; 0 without misses
    missed_bytes: int


def schedule_limit_seconds(layers: Iterable[LayerWork], flash_bytes_per_second: float) -> float:
    """The least a token can take with these misses: hits compute while misses are read, and the last one after them."""
    return sum(
        layer.dense_seconds
        + max(layer.hit_seconds, layer.missed_bytes / flash_bytes_per_second)
        + layer.last_miss_seconds
        for layer in layers
    )
