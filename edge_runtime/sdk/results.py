"""What a client gives back.

Knows: results as values. Does not know: HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """As the caller saw it, network included."""

    ttft_seconds: float  # until the first token
    total_seconds: float
    tokens_per_second: float  # all tokens over all seconds: tokens may arrive in bursts, the whole can't lie


@dataclass(frozen=True, slots=True)
class StreamToken:
    """One token. `text` is what became certain with it: "" in the middle of a character or a possible stop string."""

    id: int
    text: str
    index: int  # among the generated tokens, from 0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    timings: Timings
    prompt_token_ids: tuple[int, ...]
    request_id: str
    seed: int  # the one used, whoever chose it
    model: str
    accepted_draft_tokens: int = 0  # guesses of this device that were right,
    rejected_draft_tokens: int = 0  # and those that were run for nothing


def timings_of(started: float, first: float | None, last: float, count: int) -> Timings:
    """From the clock at the start, at the first token and at the last one."""
    first = last if first is None else first
    total = last - started
    return Timings(first - started, total, count / total if total > 0 else 0.0)
