"""A stream that broke, taken up again where the client lost it.

The client says the last event id it saw, `REQUEST/COUNTS`: how many tokens of each choice it has. Knows: positions.
Does not know: how events survive (the journal's business).
"""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from coordinator.api.context import API
from coordinator.api.errors import ApiError
from coordinator.api.guard import key_of
from coordinator.api.openai.accept import make_answer
from coordinator.api.openai.choices import Choice, Source
from coordinator.api.openai.ticket import choice_id, read_ticket
from edge_runtime.errors import UsageError

MAX_POSITION_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Position:
    """How far a client got. No counts: it has nothing yet."""

    request_id: str
    counts: tuple[int, ...] = ()


def parse_position(last_event_id: str, request_id: str = "") -> Position:
    """Of a Last-Event-ID. `request_id`: from the URL, where the header may be only the counts, or missing."""
    named, slash, counts = last_event_id.rpartition("/")
    if not slash and not counts and request_id:
        return Position(request_id)
    numbers = counts.split(".")
    if (
        len(last_event_id) > MAX_POSITION_CHARACTERS
        or (named and request_id and named != request_id)
        or not (named or request_id)
        or not all(n.isascii() and n.isdigit() and len(n) <= 10 for n in numbers)
    ):
        raise ApiError(
            "`Last-Event-ID` is not the id of an event of this stream.",
            code="invalid_value",
            param="Last-Event-ID",
        )
    return Position(named or request_id, tuple(int(n) for n in numbers))


async def resume(request: web.Request, position: Position) -> web.StreamResponse:
    """Every journalled event again, then live ones; what the client has is not sent twice."""
    service = request.app[API].service
    ticket = read_ticket(position.request_id, key_of(request).tenant)
    if ticket is None:
        raise _unknown(position.request_id)
    if position.counts and len(position.counts) != ticket.choices:
        raise ApiError(
            f"`Last-Event-ID` counts {len(position.counts)} choices, the request has {ticket.choices}.",
            code="invalid_value",
            param="Last-Event-ID",
        )
    choices = [Choice(index) for index in range(ticket.choices)]
    try:
        # From the first event: text offsets and usage need those the client has seen too.
        sources = [
            Source(await service.resume(choice_id(position.request_id, index), -1))
            for index in range(ticket.choices)
        ]
    except UsageError:
        raise _unknown(position.request_id) from None
    answer = make_answer(service, position.request_id, ticket, choices)
    return await answer.stream(request, sources, position.counts)


def _unknown(request_id: str) -> ApiError:
    return ApiError(f"There is no request `{request_id[:128]}`.", code="request_not_found", param="request")
