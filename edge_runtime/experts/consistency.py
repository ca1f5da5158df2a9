"""How consistently a model routes: whether neighbouring tokens want the same experts, so that a cache can help at all.

Two figures of "Not All Models Suit Expert Offloading" (arXiv 2505.16056), over routing [tokens, layers, top_k]:

- SRP(m), segment routing best performance: how well one fixed set of experts per window of m tokens would foretell what
  its tokens choose (the best F1 over all thresholds of how often an expert must be chosen in the window);
  `set_size` is how large that set is, in multiples of top_k.
- SCH(m, rho), segment cache best hit rate: of a cache of rho * top_k experts per layer that knows the next m tokens and
  evicts who is wanted least in them. First touches count as misses here.

Knows: counting. Does not know: models, caches that can't see the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import UsageError

Routing = NDArray[np.int32]  # [tokens, layers, top_k]
SEGMENT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SegmentRouting:
    srp: float
    set_size: float


def segment_routing(routing: Routing, experts: int, segment: int = SEGMENT_TOKENS) -> SegmentRouting:
    tokens, layers, _ = routing.shape
    if tokens < segment:
        raise UsageError(f"{tokens} tokens are less than one segment of {segment}", hint="use a longer text")
    of_count = np.zeros(segment + 1, np.int64)  # how many (window, layer, expert) were chosen so often
    for layer in range(layers):
        chosen = np.zeros((tokens, experts), np.int64)
        np.put_along_axis(chosen, routing[:, layer].astype(np.int64), 1, axis=1)
        sums = np.concatenate([np.zeros((1, experts), np.int64), chosen.cumsum(axis=0)])
        of_count += np.bincount((sums[segment:] - sums[:-segment]).reshape(-1), minlength=segment + 1)
    counts = np.arange(segment + 1)
    activations = float((of_count * counts).sum())
    best = SegmentRouting(0.0, 0.0)
    for threshold in range(1, segment + 1):
        matched = float((of_count * counts)[threshold:].sum())
        predicted = float(segment * of_count[threshold:].sum())
        f1 = 2 * matched / (predicted + activations)
        if f1 > best.srp:
            best = SegmentRouting(f1, predicted / activations)
    return best


def segment_cache_hit_rate(
    routing: Routing, experts: int, rho: float, segment: int = SEGMENT_TOKENS
) -> float:
    tokens, layers, top_k = routing.shape
    slots = max(top_k, min(experts, round(rho * top_k)))
    hits = sum(_layer_hits(routing[:, layer], experts, slots, segment) for layer in range(layers))
    return hits / float(tokens * layers * top_k)


def _layer_hits(chosen: NDArray[np.int32], experts: int, slots: int, segment: int) -> int:
    coming = np.zeros(experts, np.int64)  # uses in the next `segment` tokens
    for row in chosen[:segment]:
        coming[row] += 1
    last_used = np.full(experts, -1, np.int64)
    here: set[int] = set()
    hits = 0
    for token, row in enumerate(chosen):
        coming[row] -= 1
        if token + segment < len(chosen):
            coming[chosen[token + segment]] += 1
        wanted = row.tolist()
        hits += sum(expert in here for expert in wanted)
        last_used[wanted] = token
        here.update(wanted)
        while len(here) > slots:
            here.remove(min(here.difference(wanted), key=lambda e: (coming[e], last_used[e])))
    return hits
