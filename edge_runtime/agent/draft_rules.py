"""What stage 1, the one writer, makes of a draft: rows to run in advance, or nothing (docs/speculative.md).

A draft is positional and idempotent: one that is late, repeated, reordered or wrong costs speed at most.

Knows: a session's continuation and a draft. Does not know: queues, links, the target's opinion of what is still open.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.agent.continuation import Continuation
from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS
from edge_runtime.engine.side_rows import NO_SIDES, SideRows, chain_length, parted
from edge_runtime.protocol.messages import Draft

MAX_ROWS_AHEAD = 512  # issued and not yet judged: more is no window, but a flood
STEPS_UNDER_WAY = 2  # per stage: one that runs, one that waits or travels
MAX_FRAME_ROWS = 32  # longer drafts go as several frames: the next stage begins while this one goes on
MAX_SIDE_ROWS = 16  # of a frame: each costs a copy of a page, and at most one of a position is right


@dataclass(frozen=True, slots=True)
class Merged:
    """`ids` go on from the last row issued; drafts of turns below `turn` need not be looked at any more."""

    ids: tuple[int, ...]
    turn: int
    reason: str = ""  # why there is nothing to issue
    sides: SideRows = NO_SIDES  # beside `ids`


def rows_ahead(sessions: int, stages: int) -> int:
    """How many guessed rows of one session may be under way while so many are running, itself included.

    Sessions share a step's rows evenly, and each one's next row comes first: where these fill a step, nobody guesses.
    """
    if sessions <= 1:
        return MAX_ROWS_AHEAD
    return max(0, MAX_DECODE_ROWS // sessions - 1) * STEPS_UNDER_WAY * stages


def merge(chain: Continuation, rows: int, max_rows: int, turn: int, ahead: int, draft: Draft) -> Merged:
    """`rows`: issued so far, given ones too. `turn`: of drafts, the highest that counted. `ahead`: `rows_ahead`.

    A draft never changes the turn that rows carry: a miss makes rows dead only where rows are issued anew, and rows of
    the target's own continuation may still be on their way under the old one.
    """
    if rows < chain.given:
        return Merged((), turn, "the given rows are not all issued")
    if draft.turn < turn:
        return Merged((), turn, f"turn {draft.turn} is over: {turn}")
    if draft.base_row > rows:
        return Merged((), turn, f"row {rows} is next: a draft before it was lost")
    if draft.base_row < chain.given or draft.turn > max_rows:
        return Merged((), turn, "no such position to guess")
    ids, sides = _tree(draft)
    wrong = chain.contradicts(draft.base_row, ids)
    if wrong is not None:
        return Merged((), max(turn, wrong), f"position {wrong} has another id")
    here = chain.issued[draft.base_row - chain.given :]
    if list(ids[: len(here)]) != here[: len(ids)]:
        return Merged((), turn, "other guesses for the same positions are being judged")
    end = min(max_rows - 1, chain.next_position + ahead)
    new = ids[len(here) : max(0, end - draft.base_row)]
    first = draft.base_row + len(here)
    beside = _beside(sides, first, first + len(new), max_rows) if ahead >= MAX_ROWS_AHEAD else NO_SIDES
    return Merged(new, max(turn, draft.turn), "" if new else "nothing new in it, or no room", beside)


def _tree(draft: Draft) -> tuple[tuple[int, ...], SideRows]:
    """The chain alone where the rest makes no sense."""
    try:
        return parted(draft.base_row, draft.parents, draft.ids)
    except ValueError:
        count = min(len(draft.ids), chain_length(draft.base_row, draft.parents))
        return draft.ids[:count], NO_SIDES


def _beside(sides: SideRows, first: int, end: int, max_rows: int) -> SideRows:
    """Those that continue rows `first` - 1 .. `end` - 1 of the chain, at positions where a row is of use."""
    places = zip((sides.path(index)[0] for index in range(len(sides))), sides.positions(), strict=True)
    return sides.only([first - 1 <= row < end and position < max_rows - 1 for row, position in places])[0]


def in_frames(base_row: int, merged: Merged) -> list[tuple[tuple[int, ...], SideRows]]:
    """(ids, side rows) of each frame. Side rows go with the row of the chain that they stand beside."""
    frames = []
    for at in range(0, len(merged.ids), MAX_FRAME_ROWS):
        ids = merged.ids[at : at + MAX_FRAME_ROWS]
        is_last = at + len(ids) == len(merged.ids)
        rows = range(base_row + at - 1, base_row + at + len(ids) - (0 if is_last else 1))
        sides = merged.sides
        here = sides.only([sides.path(index)[0] in rows for index in range(len(sides))])[0]
        frames.append((ids, here.only([index < MAX_SIDE_ROWS for index in range(len(here))])[0]))
    return frames
