"""How far counts lie from a distribution: the two measures that the sampler's gates use."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def chi_square(counts: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Pearson's statistic minus its degrees of freedom, in standard deviations; rare ids pooled."""
    expected = p * counts.sum()
    rare = expected < 10
    groups = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0:
        groups.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((float(c) - e) ** 2 / e for c, e in groups)
    freedom = len(groups) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def total_variation(counts: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    return float(np.abs(counts / counts.sum() - p).sum() / 2)
