"""Whether a request may wait at all, and what a session takes of a pipeline's memory (`assignment.py` gives it out).

Knows: numbers. Does not know: clocks, devices, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import CapacityError

KV_PAGE_TOKENS = 32  # stages commit KV in pages of this many rows


@dataclass(frozen=True, slots=True)
class Waiting:
    key: str
    tenant: str
    order: int  # of arrival
    rows: int
    is_recovering: bool  # it was open before: it goes first, its user is watching
    class_map: tuple[str, ...] = ()  # (): any will do
    preferred_lease: int = 0  # of the pipeline that holds its prefix, where one does


@dataclass(frozen=True, slots=True)
class Running:
    tenant: str
    rows: int


def reserved_tokens(rows: int) -> int:
    """KV tokens that a session of `rows` rows takes: whole pages."""
    return -(-rows // KV_PAGE_TOKENS) * KV_PAGE_TOKENS


def check_context(prompt_tokens: int, max_tokens: int, *, max_context_tokens: int) -> None:
    """Raises CapacityError where the model's context can never hold the request."""
    if prompt_tokens + max_tokens > max_context_tokens:
        raise CapacityError(
            f"this model's context holds {max_context_tokens} tokens; the prompt has {prompt_tokens} "
            f"and {max_tokens} more were asked for",
            hint="shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
        )


def check_fits(rows: int, *, capacity_tokens: int) -> None:
    """Raises CapacityError where the whole KV memory of the live pipeline is too small for the request."""
    need_tokens = reserved_tokens(rows)
    if need_tokens > capacity_tokens:
        raise CapacityError(
            f"this request needs KV memory for {need_tokens} tokens; "
            f"the smallest stage of the pipeline holds {capacity_tokens}",
            hint="shorten the prompt, lower max_tokens, or give the devices more memory",
        )


def check_queue(waiting: int, *, max_waiting: int) -> None:
    """Raises CapacityError "overloaded" where the queue is full: refusing early keeps the promises made to others."""
    if waiting >= max_waiting:
        raise CapacityError(
            f"{waiting} requests are waiting already, which is as many as this coordinator queues",
            hint="try again in a moment",
            code="overloaded",
        )
