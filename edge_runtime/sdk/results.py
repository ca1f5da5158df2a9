"""What a client gives back.

Knows: results as values. Does not know: HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TARGET, DRAFT = "target", "draft"
"""Who an answer is from: the model that was asked, or this device's draft model, which the caller allowed."""


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
    answered_by: str = TARGET


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, so that it can be asked again: a path of the API and its body, seed included."""

    path: str
    body: Mapping[str, Any]


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
    answered_by: str = TARGET  # "draft": the tokens from `target_tokens` on are the draft model's
    target_tokens: int = 0  # leading tokens that are the target's
    offline_reason: str = ""  # why the target could not be asked, or not to the end
    question: Question | None = field(default=None, repr=False)  # of an answer that can be upgraded


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The target's answer to a question that the draft model had answered."""

    result: Result
    first_difference: int | None  # index of the first generated id that differs; None: the same ids


def first_difference(ids: Sequence[int], others: Sequence[int]) -> int | None:
    """Where one ends before the other, that is the first difference."""
    both = min(len(ids), len(others))
    differing = (index for index in range(both) if ids[index] != others[index])
    return next(differing, None if len(ids) == len(others) else both)


def timings_of(started: float, first: float | None, last: float, count: int) -> Timings:
    """From the clock at the start, at the first token and at the last one."""
    first = last if first is None else first
    total = last - started
    return Timings(first - started, total, count / total if total > 0 else 0.0)
