"""What a model said about each row of a text, small enough to keep: its top token and the true token's log-probability.

Knows: logits. Does not know: where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint import Floats

LOGIT_COLUMNS = 4096  # of the vocabulary whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class Scores:
    """One entry a row; rows without a known next token have `scored` false."""

    top: NDArray[np.int64]
    logprob: NDArray[np.float64]
    scored: NDArray[np.bool_]

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logprob[self.scored].mean())) if self.scored.any() else 1.0

    def agreement(self, other: Scores) -> float:
        """Share of rows on which both have the same top token."""
        return float((self.top == other.top).mean())


class ScoreBuilder:
    """Takes logits [R, some of the vocabulary] piece by piece, in order of token id."""

    def __init__(self, targets: NDArray[np.int64]) -> None:
        rows = len(targets)
        self._targets = targets
        self._top = np.zeros(rows, np.int64)
        self._maximum = np.full(rows, -np.inf)
        self._sum = np.zeros(rows)  # of exp(logit - maximum)
        self._target = np.zeros(rows)

    def add(self, first_id: int, logits: Floats) -> None:
        best = logits.argmax(axis=1)
        values = logits[np.arange(len(logits)), best].astype(np.float64)
        self._top = np.where(values > self._maximum, first_id + best, self._top)
        maximum = np.maximum(values, self._maximum)
        self._sum *= np.exp(self._maximum - maximum)
        self._sum += np.exp(logits - maximum[:, None]).sum(axis=1)
        self._maximum = maximum
        inside = np.nonzero((self._targets >= first_id) & (self._targets < first_id + logits.shape[1]))[0]
        self._target[inside] = logits[inside, self._targets[inside] - first_id]

    def scores(self) -> Scores:
        logprob = self._target - self._maximum - np.log(self._sum)
        return Scores(self._top, logprob, self._targets >= 0)
