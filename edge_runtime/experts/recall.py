"""How many of a layer's experts its predictors name: now and then a few layers of a step are looked at.

That, and learning from every sixteenth step, happen after a step, so that no layer waits for them; in other steps
nothing at all: two thousandths of the time of a token.

Knows: what the rows of a step chose, layer after layer. Does not know: slots, reading, when guesses are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.experts.affinity import Affinity
from edge_runtime.experts.next_gate import NextGate
from edge_runtime.experts.predictor import Predictor, best_of, recalled
from edge_runtime.experts.statistics import CacheStatistics

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

LEARNS_EVERY_STEPS = 16
COMPARES_EVERY_STEPS = 64
COMPARED_PLACES = 12  # in turns
MOST_ROWS = 4  # of a step: prompts say little about decoding


@dataclass(slots=True)
class _Named:
    compared: int = 0
    by_gate: int = 0
    by_affinity: int = 0


class Recall:
    """`layers`: numbers of those with experts, in order; a step asks for all of them or is left out."""

    def __init__(
        self, layers: Sequence[int], gate: NextGate, affinity: Affinity | None, statistics: CacheStatistics
    ) -> None:
        self._layers = tuple(layers)
        self._gate, self._affinity = gate, affinity
        self._statistics = statistics
        self._named = [_Named() for _ in layers]  # by the place the guess was made at
        self._steps = 0
        self.recall = 0.0  # of the better predictor of each layer: the share of experts that it named
        self._ids: list[Int32] = []
        self._rows: dict[int, Float32] = {}  # by place, of those looked at in this step
        self._looks_at = range(0)
        self._learns = False

    def begin_step(self, rows: int) -> bool:
        """Whether `note` and `end_step` are wanted in this step."""
        self._ids, self._rows = [], {}
        self._learns, self._looks_at = False, range(0)
        if rows <= MOST_ROWS:
            self._steps += 1
            self._learns = self._steps % LEARNS_EVERY_STEPS == 0
            self._looks_at = looked_at(self._steps, len(self._layers) - 1)
        return self._learns or bool(self._looks_at)

    def note(self, place: int, x: Float32, ids: Int32) -> None:
        """What the layer at `place` was asked for: x [R, hidden], ids [R, top_k]."""
        if (self._learns or self._looks_at) and place == len(self._ids):
            self._ids.append(ids)
            if place in self._looks_at:
                self._rows[place] = x.copy()

    def end_step(self) -> None:
        """After the last layer."""
        is_whole = len(self._ids) == len(self._layers) and len({ids.shape for ids in self._ids}) == 1
        if is_whole and self._looks_at:
            self._compare()
        if is_whole and self._learns and self._affinity is not None:
            self._affinity.learn(np.stack(self._ids))
        self._ids, self._rows = [], {}

    def best(self, place: int) -> Predictor | None:
        """Whoever named most of what followed the layer at `place`; None: nothing was compared, or nobody named any."""
        named = self._named[place]
        predictors: list[Predictor] = [self._gate]
        counts = [named.by_gate]
        if self._affinity is not None:
            predictors.append(self._affinity)
            counts.append(named.by_affinity)
        return best_of(predictors, counts)

    def _compare(self) -> None:
        for place in self._looks_at:
            x, ids, following = self._rows[place], self._ids[place], self._ids[place + 1]
            by_gate = by_affinity = 0
            if self._gate.reaches(place):
                by_gate = recalled(self._gate, place, x, ids, following)
            if self._affinity is not None:
                by_affinity = recalled(self._affinity, place, x, ids, following)
            named = self._named[place]
            named.compared += following.size
            named.by_gate += by_gate
            named.by_affinity += by_affinity
            self._statistics.count_guesses(
                self._layers[place + 1], compared=following.size, by_gate=by_gate, by_affinity=by_affinity
            )
        compared = sum(named.compared for named in self._named)
        self.recall = sum(max(named.by_gate, named.by_affinity) for named in self._named) / max(1, compared)


def looked_at(step: int, places: int) -> range:
    """Places whose guesses are compared in a step; step after step all have their turn."""
    turn, rest = divmod(step, COMPARES_EVERY_STEPS)
    if rest:
        return range(0)
    turns = -(-places // COMPARED_PLACES)
    first = turn % turns * COMPARED_PLACES
    return range(first, min(places, first + COMPARED_PLACES))
