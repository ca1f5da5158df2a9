"""One generation as a stage sees it: how far its rows have come.

Knows: rows held, the last seq and turn, and what an order may ask. Does not know: other sessions, links, or execution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_runtime.agent.continuation import Continuation
from edge_runtime.core import SessionId, Token
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import NOBODY_ASKS, PAGE_NAME_BYTES, Draft, OpenSession

MAX_HELD_DRAFTS = 64  # of one session


@dataclass(slots=True)
class Session:
    """One generation, as this stage sees it."""

    order: OpenSession
    rows: int = 0  # accepted for running: rows 0 .. rows - 1 are run or queued
    seq: int = 0  # stage 1: last issued; others: last accepted
    turn: int = 0  # last seen, or learned: rows of older ones are dead
    draft_turn: int = 0  # stage 1: drafts of older ones are not looked at
    held_drafts: list[Draft] = field(default_factory=list)  # stage 1: that came before the ids they follow
    guessed: bool = False  # the tail: rows came in advance
    side_depth: int = 0  # stage 1: so many ids at most did side rows give at once
    fed: list[int] = field(default_factory=list)  # stage 1: ids of rows from `rows` on, not yet a whole chunk
    halted: bool = False  # finished, or a gap was reported: nothing more will run
    first_row: int | None = 0  # of those to run: the ones below every stage holds; None: that is being asked
    held_rows: int = 0  # of other sessions, here and on all stages before
    through: int = 0  # stage 1: rows known to have come through the tail
    chain: Continuation = field(init=False)  # stage 1 and the tail

    def __post_init__(self) -> None:
        self.chain = Continuation(self.order.forced_rows)

    @property
    def id(self) -> SessionId:
        return SessionId(self.order.session)

    @property
    def is_bidirectional(self) -> bool:
        return self.order.tail == "pooler"

    @property
    def page_names(self) -> tuple[bytes, ...]:
        return split_names(self.order.page_names)

    @property
    def rows_under_way(self) -> int:
        """Prompt rows between stage 1 and the tail."""
        return max(0, min(self.rows, self.order.forced_rows) - self.through)

    def abandon(self, row: int) -> None:
        """There is another id at position `row`: rows from there on, of the turns so far, count for nothing.

        Nor, at stage 1, do rows before it that may not have come through yet: side rows may have given the ids right
        after the last miss, whose row, issued anew, would be lost with its turn.
        """
        first = row
        if row <= self.turn + self.side_depth:
            through = self.chain.next_position - 1 - self.side_depth
            first = max(self.order.forced_rows, min(row, through))
        self.turn = row
        self.rows = min(self.rows, first)
        self.chain.cut(first)

    @property
    def any_turn(self) -> int:
        """Of rows or drafts, whichever is higher."""
        return max(self.turn, self.draft_turn)

    def hold(self, draft: Draft) -> bool:
        """Stage 1: whether the draft waits. Its sender may be nearer to the tail and know ids not yet here."""
        knows_more = draft.base_row > self.rows or draft.turn >= self.chain.next_position
        if self.halted or not knows_more or self.rows < self.order.forced_rows:
            return False
        del self.held_drafts[: 1 - MAX_HELD_DRAFTS]
        self.held_drafts.append(draft)
        return True

    def begin_at(self, row: int) -> None:
        """Stage 1: every stage holds the rows below. Nothing was issued yet."""
        self.first_row = self.through = row

    def take_chunk(self, grid: int) -> tuple[int, ...]:
        """Stage 1: the next ids to issue, () where they are not all here.

        Chunks end on multiples of the grid, wherever the ids came from: chunking depends on positions alone.
        """
        if self.first_row is None or self.halted:
            return ()
        skipped = max(0, self.first_row - self.rows)
        start, forced = self.rows + skipped, self.order.forced_rows
        end = forced if self.is_bidirectional else min(forced, (start // grid + 1) * grid)
        if len(self.fed) < end - self.rows or end <= start:
            return ()
        ids = tuple(self.fed[skipped : end - self.rows])
        del self.fed[: end - self.rows]
        self.rows = start
        return ids


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
    names, rest = divmod(len(order.page_names), PAGE_NAME_BYTES)
    if rest or names * PAGE_TOKENS >= order.forced_rows or (names and order.tail != "sampler"):
        return "named pages must be full pages of given rows, with at least one row after them"
    if order.held_rows not in (NOBODY_ASKS, *range(0, names * PAGE_TOKENS + 1, PAGE_TOKENS)):
        return "only rows of named pages can be held already"
    return ""


def split_names(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[at : at + PAGE_NAME_BYTES] for at in range(0, len(joined), PAGE_NAME_BYTES))
