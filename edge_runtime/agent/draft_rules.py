"""What stage 1, the one writer, makes of a draft: rows to run in advance, or nothing (docs/speculative.md).

A draft is positional and idempotent: one that is late, repeated, reordered or wrong costs speed at most.

Knows: a session's continuation and a draft. Does not know: queues, links, the target's opinion of what is still open.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.agent.continuation import Continuation
from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS
from edge_runtime.protocol.messages import Draft

MAX_ROWS_AHEAD = 512  # issued and not yet judged: more is no window, but a flood
STEPS_UNDER_WAY = 2  # per stage: one that runs, one that waits or travels
MAX_FRAME_ROWS = 32  # longer drafts go as several frames: the next stage begins while this one goes on


@dataclass(frozen=True, slots=True)
class Merged:
    """`ids` go on from the last row issued; drafts of turns below `turn` need not be looked at any more."""

    ids: tuple[int, ...]
    turn: int
    reason: str = ""  # why there is nothing to issue


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
    ids = main_chain(draft)
    wrong = chain.contradicts(draft.base_row, ids)
    if wrong is not None:
        return Merged((), max(turn, wrong), f"position {wrong} has another id")
    here = chain.issued[draft.base_row - chain.given :]
    if list(ids[: len(here)]) != here[: len(ids)]:
        return Merged((), turn, "other guesses for the same positions are being judged")
    end = min(max_rows - 1, chain.next_position + ahead)
    new = ids[len(here) : max(0, end - draft.base_row)]
    return Merged(new, max(turn, draft.turn), "" if new else "nothing new in it, or no room")


def main_chain(draft: Draft) -> tuple[int, ...]:
    """The ids at the front, each of which continues the one before."""
    count = 0
    for parent in draft.parents[: len(draft.ids)]:
        if parent != draft.base_row + count - 1:
            break
        count += 1
    return draft.ids[:count]


def in_frames(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [ids[at : at + MAX_FRAME_ROWS] for at in range(0, len(ids), MAX_FRAME_ROWS)]
