"""What of a tree of rows is still open once ids are committed: what the tail does with side rows before it runs them.

A side row beside a committed position is of no use any more, except where the chain was wrong there and the side row
was right: then it, and what continues it, is the chain. So a frame whose first row was guessed wrong need not be dead.

Knows: one work's rows and ids that are committed. Does not know: turns, queues, sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_runtime.agent.pipeline_events import Rows, Work


def rescued(work: Work, start: int, known: Sequence[int]) -> Work | None:
    """The chain that side rows make with the committed ids `known` of positions `start` on, and what continues it.

    `work.ids` is known to be right below `start`. None where its chain is right, or no side row goes the committed way
    to its end.
    """
    newest, end = start + len(known) - 1, work.base_row + len(work.ids)
    if not work.sides or not work.base_row <= start <= end:
        return None
    miss = start
    while miss <= newest and miss < end and work.ids[miss - work.base_row] == known[miss - start]:
        miss += 1
    path, parent = [], miss - 1
    for token_id in known[miss - start :]:
        child = work.sides.child(parent, token_id)
        if child is None:
            return None
        path.append(child)
        parent = ~child
    if not path:
        return None
    right = miss - work.base_row
    sides, below = work.sides.below(path[-1], newest)
    kept = [*range(right), *(len(work.ids) + index for index in (*path, *below))]
    ids = work.ids[:right] + tuple(known[miss - start :])
    return replace(work, ids=ids, sides=sides, hidden=_picked(work.hidden, kept), logit_rows=1)


def pruned(work: Work, newest: int) -> Work:
    """Without side rows beside positions up to `newest`, which are committed, and what continues these."""
    if not work.sides:
        return work
    wanted = [work.sides.path(index)[0] >= newest for index in range(len(work.sides))]
    return with_only(work, wanted)


def with_only(work: Work, wanted: Sequence[bool]) -> Work:
    """`wanted`: which side rows stay; those that continue others go with them."""
    if all(wanted):
        return work
    sides, kept = work.sides.only(wanted)
    rows = [*range(len(work.ids)), *(len(work.ids) + index for index in kept)]
    return replace(work, sides=sides, hidden=_picked(work.hidden, rows))


def chain_of(work: Work) -> Work:
    """Without side rows."""
    return with_only(work, [False] * len(work.sides))


def _picked(hidden: Rows | None, rows: Sequence[int]) -> Rows | None:
    return None if hidden is None else hidden[list(rows)]
