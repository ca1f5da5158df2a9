"""One generation as a stage sees it: how far its rows have come.

Knows: rows held, the last seq and turn, and what an order may ask. Does not know: other sessions, links, or execution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_runtime.core import SessionId, Token
from edge_runtime.protocol.messages import OpenSession


@dataclass(slots=True)
class Session:
    """One generation, as this stage sees it."""

    order: OpenSession
    rows: int = 0  # accepted for running: rows 0 .. rows - 1 are run or queued
    seq: int = 0  # stage 1: last issued; others: last accepted
    turn: int = 0  # last seen
    fed: list[int] = field(default_factory=list)  # stage 1: ids of rows from `rows` on, not yet a whole chunk
    halted: bool = False  # finished, or a gap was reported: nothing more will run

    @property
    def id(self) -> SessionId:
        return SessionId(self.order.session)

    @property
    def is_bidirectional(self) -> bool:
        return self.order.tail == "pooler"


def finish_of(order: OpenSession, token: Token) -> str:
    if token.id in order.stop_ids:
        return "stop"
    return "length" if token.position + 1 >= order.max_rows else ""


def problem_of(order: OpenSession) -> str:
    if order.tail not in ("sampler", "pooler"):
        return f"there is no tail of kind {order.tail!r}"
    if not 1 <= order.forced_rows <= order.max_rows or not 0 <= order.prompt_rows <= order.forced_rows:
        return "a session needs 1 <= forced rows <= max rows, and no more prompt rows than forced ones"
    if order.tail == "sampler" and order.forced_rows == order.max_rows:
        return "a session that generates needs room for at least one token"
    return ""
