"""Which waiting session starts on which pipeline.

Turns go round the tenants: the one with the fewest sessions open is next, first come first served within a tenant. Room
is counted in KV tokens of a pipeline's smallest stage, reserved for all a session may grow to, so that an admitted
session never runs out. Whoever is next and does not fit yet is waited for, on the pipelines that could take it: small
requests never starve a large one, and nobody waits for a pipeline of another numeric class.

Knows: numbers and classes. Does not know: clocks, devices, tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.scheduling.admission import Running, Waiting, reserved_tokens


@dataclass(frozen=True, slots=True)
class Room:
    """A live pipeline, as far as sessions care."""

    lease: int
    capacity_tokens: int
    tokens_per_second: float  # of one session that has it to itself
    class_map: tuple[str, ...]
    running: tuple[Running, ...] = ()


@dataclass(slots=True)
class _Desk:
    room: Room
    free_tokens: int = field(init=False)
    open_sessions: int = field(init=False)

    def __post_init__(self) -> None:
        self.free_tokens = self.room.capacity_tokens - sum(reserved_tokens(r.rows) for r in self.room.running)
        self.open_sessions = len(self.room.running)

    def could_take(self, session: Waiting) -> bool:
        """If it were empty."""
        is_right_class = not session.class_map or session.class_map == self.room.class_map
        return is_right_class and reserved_tokens(session.rows) <= self.room.capacity_tokens

    @property
    def seconds_per_token(self) -> float:
        """Of one more session, where all share the pipeline's time."""
        return (self.open_sessions + 1) / max(self.room.tokens_per_second, 1e-9)


def assign(waiting: Iterable[Waiting], rooms: Sequence[Room], *, max_running: int) -> list[tuple[str, int]]:
    """(key, lease) of the sessions to open now, in order."""
    desks = [_Desk(room) for room in rooms]
    open_by_tenant = Counter(session.tenant for room in rooms for session in room.running)
    free_slots = max_running - sum(desk.open_sessions for desk in desks)
    left = list(waiting)
    chosen: list[tuple[str, int]] = []
    while left and desks and free_slots > 0:
        session = min(left, key=lambda w: (not w.is_recovering, open_by_tenant[w.tenant], w.order))
        left.remove(session)
        able = [desk for desk in desks if desk.could_take(session)]
        desk = _choose(session, able)
        if desk is None:
            desks = [other for other in desks if other not in able]  # what gets free there is for this one
            continue
        chosen.append((session.key, desk.room.lease))
        open_by_tenant[session.tenant] += 1
        desk.free_tokens -= reserved_tokens(session.rows)
        desk.open_sessions += 1
        free_slots -= 1
    return chosen


def soonest(rows: int, rooms: Sequence[Room]) -> Room:
    """Where a new session of so many rows would be served soonest, among those large enough for it."""
    desks = [_Desk(room) for room in rooms]
    need_tokens = reserved_tokens(rows)
    able = [desk for desk in desks if need_tokens <= desk.room.capacity_tokens] or desks
    return min(
        able, key=lambda d: (d.free_tokens < need_tokens, d.seconds_per_token, -d.free_tokens, d.room.lease)
    ).room


def _choose(session: Waiting, able: Sequence[_Desk]) -> _Desk | None:
    """The one that holds its prefix, else where it is soonest served, else where most memory is free."""
    having_room = [desk for desk in able if desk.free_tokens >= reserved_tokens(session.rows)]
    return min(
        having_room,
        key=lambda desk: (
            desk.room.lease != session.preferred_lease,
            desk.seconds_per_token,
            -desk.free_tokens,
            desk.room.lease,
        ),
        default=None,
    )
