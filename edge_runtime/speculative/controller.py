"""How far ahead to draft and in what pieces: the choice that commits most tokens per second of one session.

One session (research: the streamed pipeline with a fenced restart, checked there by event simulation):

    rate(c, W) = 1 / (tau + (1 - a) (L + (c - 1) Td / 2))      tau = max(Td, s(c) / c, L / W)

a: acceptance, L: loop, Td: time of a draft, s(c): service of a frame of c rows at the slowest stage, W: window.
It does not yet choose to draft nothing (k = 0) or to share a loaded target between sessions.

Knows: measured values. Does not know: time, frames, links, or how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from edge_runtime.speculative.estimates import Measured

CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SLACK = 1.3  # windows a little larger than a loop holds: a verdict that is late must not stall the stream


@dataclass(frozen=True, slots=True)
class Limits:
    max_window: int = 64  # drafts in flight
    max_width: int = 1  # side rows are for targets that run trees
    max_chunk: int = 32


@dataclass(frozen=True, slots=True)
class Choice:
    """`window`: drafts in flight, 0 for none at all. `chunk`: ids of a frame. `width`: guesses per position."""

    window: int
    chunk: int
    width: int


def mean_acceptance(measured: Measured, depth: int) -> float:
    """Of the first `depth` drafts, each weighted by the chance that it is judged at all."""
    weight, total, accepted = 1.0, 0.0, 0.0
    for index in range(max(1, depth)):
        chance = measured.acceptance[min(index.bit_length(), len(measured.acceptance) - 1)]
        total += weight
        accepted += weight * chance
        weight *= chance
    return accepted / total


def token_seconds(measured: Measured, chunk: int, window: int) -> float:
    """tau of the formula: seconds between ids while guesses are right."""
    service = measured.service_seconds + (chunk - 1) * measured.service_row_seconds
    return max(measured.draft_seconds, service / chunk, measured.loop_seconds / max(1, window))


def streamed_rate(measured: Measured, chunk: int, window: int) -> float:
    """Committed tokens per second of one session."""
    tau = token_seconds(measured, chunk, window)
    miss = 1 - mean_acceptance(measured, window)
    restart = measured.loop_seconds + (chunk - 1) * measured.draft_seconds / 2
    return 1 / (tau + miss * restart)


def choose(measured: Measured, limits: Limits) -> Choice:
    """The chunk with the best rate, and the window that keeps the loop full."""
    chunk = max(
        (c for c in CHUNKS if c <= limits.max_chunk),
        key=lambda c: (streamed_rate(measured, c, limits.max_window), -c),
    )
    tau = token_seconds(measured, chunk, limits.max_window)
    window = min(limits.max_window, ceil(SLACK * measured.loop_seconds / tau) + chunk)
    return Choice(window, chunk, limits.max_width)


class Controller:
    """What `draft_loop` asks: `choose` under fixed limits."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def choose(self, measured: Measured, committed_ids: int) -> Choice:
        """`committed_ids`: of this request, so far; not used yet."""
        return choose(measured, self.limits)
