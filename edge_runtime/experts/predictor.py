"""Which experts the next layer will want, guessed while this one runs.

Layers with experts are counted by place: 0 is the first of the stage that has any. A guess decides what is kept or
read, never what is computed.

Knows: scores and what follows from them. Does not know: how they are made (`affinity`, `next_gate`), slots, reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Predictor(Protocol):
    """Pure, but for what it has learnt."""

    @property
    def name(self) -> str: ...

    def reaches(self, place: int) -> bool:
        """Whether it can say what follows the layer at `place`."""
        ...

    def scores(self, place: int, x: Float32, ids: Int32) -> Float32:
        """x [R, hidden], what the router of the layer at `place` saw, and ids [R, top_k], what it chose -> [R, experts]
        of the layer that follows: the higher the likelier, comparable within a row."""
        ...


def likeliest(scores: Float32, most: int) -> Int32:
    """[R, experts] -> [R, most]: the best of each row, in no order."""
    most = min(most, scores.shape[1])
    return np.argpartition(-scores, most - 1, axis=1)[:, :most].astype(np.int32)


def wanted(scores: Float32, most: int) -> list[int]:
    """Of all rows together: each row's `most` best, without repetition; what several rows want, or want most, first."""
    if len(scores) == 1:
        row = scores[0]
        found = likeliest(scores, most)[0]
        return [int(expert) for expert in found[np.argsort(-row[found], kind="stable")]]
    votes: dict[int, float] = {}
    for row, found in zip(scores, likeliest(scores, most), strict=True):
        order = found[np.argsort(-row[found], kind="stable")]
        for rank, expert in enumerate(order.tolist()):
            votes[expert] = votes.get(expert, 0.0) + 1.0 / (1 + rank)
    return sorted(votes, key=lambda expert: (-votes[expert], expert))


def recalled(predictor: Predictor, place: int, x: Float32, ids: Int32, following: Int32) -> int:
    """How many of the experts that the next layer chose, `following` [R, top_k], were among their row's best top_k."""
    guessed = likeliest(predictor.scores(place, x, ids), following.shape[1])
    return int((guessed[:, :, None] == following[:, None, :]).sum())


def best_of(predictors: Sequence[Predictor], named: Sequence[int]) -> Predictor | None:
    """The one that named most of the same experts; the first of equals. None: nobody named any."""
    most = max(named, default=0)
    return predictors[named.index(most)] if most else None
