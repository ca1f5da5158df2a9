"""Inter-layer affinity: how often an expert of one layer was followed by an expert of the next, for the same row.

Counts are learnt while the model runs, and old ones fade.
Source: ExFlow (arXiv 2401.08383) counts the same conditional probabilities to place experts on devices.

Knows: counts. Does not know: rows' hidden states, slots, what a guess is used for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

FADES_TO = 0.999  # of what a row counted, with every row after it
MOST_BYTES = 32 << 20  # of counts: a model with more goes without
_PRIOR = 1.0  # rows' worth of "as often as with any expert before it"
_LARGE = 1e6


class Affinity:
    """`layers` layers of `experts` experts each, `top_k` used."""

    name = "affinity"

    def __init__(self, layers: int, experts: int, *, fades_to: float = FADES_TO) -> None:
        self._counts = np.zeros((max(0, layers - 1), experts, experts), np.float32)
        self._places = np.arange(len(self._counts))
        self._totals = np.zeros((len(self._counts), experts), np.float32)  # of each expert that is followed
        self._shares = np.zeros((len(self._counts), experts), np.float32)  # of each that follows
        self._worth = 1.0  # of a row now: grows, instead of all counts shrinking
        self._fades_to = fades_to

    @staticmethod
    def size_bytes(layers: int, experts: int) -> int:
        return max(0, layers - 1) * experts * experts * 4

    def reaches(self, place: int) -> bool:
        return place < len(self._counts)

    def learn(self, ids: Int32) -> None:
        """ids [layers, R, top_k]: what the rows of a step chose in each layer, each expert of a row once."""
        places = self._places[:, None, None]
        for row in range(ids.shape[1]):
            before, after = ids[:-1, row], ids[1:, row]
            self._counts[places, before[:, :, None], after[:, None, :]] += self._worth
            self._totals[self._places[:, None], before] += self._worth
            self._shares[self._places[:, None], after] += self._worth
            self._worth /= self._fades_to
        if self._worth > _LARGE:
            for counts in (self._counts, self._totals, self._shares):
                counts /= self._worth
            self._worth = 1.0

    def scores(self, place: int, x: Float32, ids: Int32) -> Float32:
        """Sum over a row's experts of P(next expert | expert), where an expert hardly seen says what all say."""
        shares = self._shares[place] / max(1e-9, float(self._shares[place].sum()))
        prior = np.float32(_PRIOR * self._worth)
        given = self._counts[place][ids] + prior * shares  # [R, top_k, experts]
        return np.asarray((given / (self._totals[place][ids] + prior)[:, :, None]).sum(axis=1), np.float32)
