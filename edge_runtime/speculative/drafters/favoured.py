"""Which ids a model and the noise of a position favour together, and how clearly.

Knows: one row of penalised logits, the sampling parameters, the position. Does not know: sequences, models, targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from edge_kernels import sampling
from numpy.typing import NDArray

from edge_runtime.core import SamplingParams

CANDIDATES = 64  # the most likely ids, among which runners-up and the estimate are looked for


@dataclass(frozen=True, slots=True)
class Favourite:
    """`probability`: estimated, that the target's own sample at this position is `token`."""

    token: int
    probability: float


def favoured(
    values: NDArray[np.float64], params: SamplingParams, position: int, count: int = 1
) -> list[Favourite]:
    """At most `count` (from 1) ids, best first; the first is what a sampler with these logits [V] draws.

    The target draws argmax(p + T g), p its logits, T the temperature and g the keyed noise, where the draft model has
    q for p. Taking p - q to be one unit of Gumbel noise per id, the target's choice is id i with probability
    softmax(q + T g)[i]; at T = 0 that is the draft model's own probability. Raises ValueError as `sampling.sample`.
    """
    drawn = sampling.sample(
        values,
        seed=params.seed,
        position=position,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )
    ids, d = _candidates(values, params)
    if drawn not in ids:  # rare: the noise lifted an unlikely one
        ids, d = np.append(ids, drawn), np.append(d, values[drawn] - values.max())
    noise = sampling.gumbel_noise(params.seed, position, ids.astype(np.uint32))
    scores = d + params.temperature * noise
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-scores, kind="stable")
    tokens = [drawn, *(int(ids[i]) for i in order if ids[i] != drawn)][:count]
    share_of = dict(zip(ids.tolist(), shares.tolist(), strict=True))
    return [Favourite(token, share_of[token]) for token in tokens]


def _candidates(
    values: NDArray[np.float64], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Ids that the filters keep, among the most likely, ascending; and their logits below the largest.

    Near the edge of top-p rounding may differ from the sampler's by an id: these are guesses.
    """
    most = min(CANDIDATES, len(values))
    ids = np.sort(np.argpartition(-values, most - 1)[:most])
    d = values[ids] - values.max()
    if params.temperature == 0.0:
        return ids, d
    order = np.lexsort((ids, -d))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(d[order] / params.temperature)
    if params.top_p < 1.0:
        is_cut = 0 < params.top_k <= most
        total = weights.sum() if is_cut else _total_weight(values, params)
        before = np.cumsum(weights) - weights
        order = order[before < params.top_p * total]
    order = order[weights[: len(order)] >= max(params.min_p, math.ulp(0.0))]
    kept = np.sort(order)
    return ids[kept], d[kept]


def _total_weight(values: NDArray[np.float64], params: SamplingParams) -> float:
    """Of all ids, or of the first top-k of them."""
    weights = np.exp((values - values.max()) / params.temperature)
    if params.top_k and params.top_k < len(weights):
        weights = np.partition(weights, len(weights) - params.top_k)[-params.top_k :]
    return float(weights.sum())
