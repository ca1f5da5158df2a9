"""Whether a model can be used on a device that holds only some of its experts: an answer before anything is bought.

Knows: routing on a text, measured times, the limit formula. Does not know: how they were measured, how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.experts.cost import LayerWork, schedule_limit_seconds
from edge_runtime.experts.policies import DEFAULT_POLICY
from edge_runtime.experts.replay import BELADY, replay
from edge_runtime.experts.trace import Access, RoutingTrace

Routing = NDArray[np.int32]  # [tokens, layers, top_k]
SHARES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """One row on this machine, everything in memory; and its flash."""

    dense_seconds: float  # of a whole token, without experts
    experts_seconds: float  # of a whole token
    flash_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a cache of some size would do."""

    share: float  # of the expert bytes
    cache_bytes: int
    cycles: float  # how many tokens' experts it holds
    hit_rate: float
    best_hit_rate: float  # Belady's
    tokens_per_second: float  # at most, by the limit formula


def in_memory_tps(speed: MeasuredSpeed) -> float:
    return 1.0 / (speed.dense_seconds + speed.experts_seconds)


def prospects(
    routing: Routing, experts: int, expert_bytes: int, speed: MeasuredSpeed, shares: Sequence[float] = SHARES
) -> list[Prospect]:
    """By size. Caches below one token's experts are left out: they would never hold what is asked for."""
    trace = trace_of(routing, experts)
    cycle = trace.layers * trace.top_k
    found = []
    for share in shares:
        slots = int(share * trace.keys)
        if slots < cycle:
            continue
        own, best = replay(trace, slots, DEFAULT_POLICY), replay(trace, slots, BELADY)
        seconds = _limit_seconds(trace, own.missed_by_access, expert_bytes, speed)
        found.append(
            Prospect(
                share=share,
                cache_bytes=slots * expert_bytes,
                cycles=slots / cycle,
                hit_rate=own.hit_rate,
                best_hit_rate=best.hit_rate,
                tokens_per_second=trace.decoded_tokens / seconds,
            )
        )
    return found


def usable_from(found: Sequence[Prospect], tokens_per_second: float) -> Prospect | None:
    """The smallest cache that is fast enough; None: not even with everything in memory."""
    return next((prospect for prospect in found if prospect.tokens_per_second >= tokens_per_second), None)


def trace_of(routing: Routing, experts: int) -> RoutingTrace:
    """Token after token, as decoding does it."""
    _, layers, top_k = routing.shape
    accesses = tuple(
        Access(token, layer, tuple(chosen), (1,) * top_k, decode=True)
        for token, by_layer in enumerate(routing.tolist())
        for layer, chosen in enumerate(by_layer)
    )
    return RoutingTrace(layers, experts, top_k, accesses)


def _limit_seconds(
    trace: RoutingTrace, missed: Sequence[int], expert_bytes: int, speed: MeasuredSpeed
) -> float:
    dense_seconds = speed.dense_seconds / trace.layers
    one_seconds = speed.experts_seconds / (trace.layers * trace.top_k)
    work = (
        LayerWork(
            dense_seconds,
            (trace.top_k - misses) * one_seconds,
            one_seconds if misses else 0.0,
            misses * expert_bytes,
        )
        for misses in missed
    )
    return schedule_limit_seconds(work, speed.flash_bytes_per_second)
