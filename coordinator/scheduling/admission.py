"""Which waiting sessions may start, and whether a request may wait at all.

Room is counted in KV tokens of the smallest stage, reserved for all a session may grow to, so that an admitted session
never runs out. Turns go round the tenants: the one with the fewest sessions open is next, first come first served
within a tenant. Whoever is next and does not fit yet is waited for: small requests never starve a large one.

Knows: numbers. Does not know: clocks, devices, tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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


@dataclass(frozen=True, slots=True)
class Running:
    tenant: str
    rows: int


def reserved_tokens(rows: int) -> int:
    """KV tokens that a session of `rows` rows takes: whole pages."""
    return -(-rows // KV_PAGE_TOKENS) * KV_PAGE_TOKENS


def admit(
    waiting: Iterable[Waiting],
    running: Iterable[Running],
    *,
    capacity_tokens: int,
    max_running: int,
) -> list[str]:
    """Keys of the sessions to open now, in order."""
    running = list(running)
    free_tokens = capacity_tokens - sum(reserved_tokens(session.rows) for session in running)
    free_slots = max_running - len(running)
    open_by_tenant = Counter(session.tenant for session in running)
    left = list(waiting)
    chosen: list[str] = []
    while left and free_slots > 0:
        session = min(left, key=lambda w: (not w.is_recovering, open_by_tenant[w.tenant], w.order))
        need_tokens = reserved_tokens(session.rows)
        if need_tokens > free_tokens:
            break
        left.remove(session)
        chosen.append(session.key)
        open_by_tenant[session.tenant] += 1
        free_tokens -= need_tokens
        free_slots -= 1
    return chosen


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
