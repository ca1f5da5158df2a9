"""What many users ask for and when, and what became of them; how much of it a cluster can do.

An open loop says little without its load: above capacity the queue grows for as long as requests come, whatever the
scheduler does. So capacity is measured first, in a closed loop of the same mix of lengths, and the open loop offers a
stated share of it, in bursts.

Knows: lengths, times of tokens. Does not know: clusters, clocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from benchmarks.streams import Stream

BURSTINESS = 2.0  # coefficient of variation of the times between arrivals; 1 would be Poisson


@dataclass(frozen=True)
class Arrival:
    at_seconds: float
    prompt_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        """Its work: rows of the model that are computed for it."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Capacity:
    """What a cluster does for a mix of requests while it always has enough to do."""

    new_tokens_per_second: float
    prompt_tokens_per_second: float

    @property
    def rows_per_second(self) -> float:
        return self.new_tokens_per_second + self.prompt_tokens_per_second


def arrivals(seed: int, count: int, per_second: float, prompt_tokens: int, new_tokens: int) -> list[Arrival]:
    """Gamma distributed times between arrivals, log-normal lengths with these medians; the same for the same seed."""
    rng = np.random.default_rng(seed)
    shape = 1 / BURSTINESS**2
    times = np.cumsum(rng.gamma(shape, 1 / (shape * per_second), count))
    prompts = rng.lognormal(np.log(prompt_tokens), 0.6, count)
    outputs = rng.lognormal(np.log(new_tokens), 0.4, count)
    return [
        Arrival(float(at), int(np.clip(prompt, 4, 4 * prompt_tokens)), int(np.clip(new, 4, 4 * new_tokens)))
        for at, prompt, new in zip(times, prompts, outputs, strict=True)
    ]


def offered(wanted: Sequence[Arrival], rows_per_second: float) -> list[Arrival]:
    """The same requests and bursts, all times stretched alike, so that they ask for so much work from first to last.

    Means of heavy-tailed gaps come out a third off even over many requests: a rate that was asked for says little of
    the one that was offered.
    """
    begin, end = wanted[0].at_seconds, wanted[-1].at_seconds
    seconds = sum(each.rows for each in wanted) / rows_per_second
    return [replace(each, at_seconds=(each.at_seconds - begin) * seconds / (end - begin)) for each in wanted]


def capacity(streams: Sequence[Stream]) -> Capacity:
    """Of a closed loop, from its first request's end to its last one's start: before and after fewer run at once.

    A prompt counts at its first token. Raises ValueError where there is no such time: the loop was too short.
    """
    begin, end = min(each.ended for each in streams), max(each.started for each in streams)
    if end <= begin:
        raise ValueError("a closed loop needs more requests than run at once")
    new = sum(begin < at <= end for each in streams for at in each.token_times)
    prompts = sum(each.prompt_tokens for each in streams if begin < each.token_times[0] <= end)
    return Capacity(new / (end - begin), prompts / (end - begin))


def starved(streams: Sequence[Stream], *, seconds: float, tokens: int, once_begun: bool = False) -> int:
    """Sessions with a silence of more than `seconds` in which others together got at least `tokens`.

    Waiting for the first token counts, from the arrival; not with `once_begun`.
    """
    everything = sorted(at for each in streams for at in each.token_times)
    count = 0
    for each in streams:
        times = each.token_times if once_begun else [each.started, *each.token_times]
        silences = [(a, b) for a, b in pairwise(times) if b - a > seconds]
        count += any(bisect_right(everything, b) - bisect_right(everything, a) > tokens for a, b in silences)
    return count


def most_overtaken(streams: Sequence[Stream]) -> int:
    """At the worst of all sessions: how many that came later got their first token before it."""
    ordered = sorted(streams, key=lambda each: each.started)
    firsts = [each.token_times[0] for each in ordered]
    return max(sum(later < own for later in firsts[at + 1 :]) for at, own in enumerate(firsts))
