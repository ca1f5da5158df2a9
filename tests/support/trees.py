"""Trees of rows for tests: drawn at random, and what each row of them must compute."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from edge_runtime.engine.base import Rows, Span
from edge_runtime.engine.side_rows import SideRows
from tests.support.stages import Pipeline, span


def random_sides(
    rng: random.Random, base_row: int, count: int, most: int, vocab_size: int, chain: Sequence[int] = ()
) -> SideRows:
    """Up to `most` side rows beside the chain of rows base_row .. base_row + count - 1, none of them twice."""
    nodes = {(base_row - 1 + index, token) for index, token in enumerate(chain)}
    sides: list[tuple[int, int]] = []
    for _ in range(rng.randint(0, most)):
        left_at = rng.randrange(max(base_row - 1, 0), base_row + count)
        parent = ~rng.randrange(len(sides)) if sides and rng.random() < 0.4 else left_at
        token = rng.randrange(vocab_size)
        if (parent, token) not in nodes:
            nodes.add((parent, token))
            sides.append((parent, token))
    return SideRows(tuple(token for _, token in sides), tuple(parent for parent, _ in sides))


def with_sides(one: Span, sides: SideRows) -> Span:
    return Span(one.session, one.base_row, one.ids, one.logit_rows, one.causal, sides)


def logits_of_sides(pipeline: Pipeline, session: int, before: Sequence[int], one: Span) -> Rows:
    """[sides, V]: each side row at the end of a chain, in a session of its own."""
    found: list[Rows] = []
    for index in range(len(one.sides)):
        left_at, path = one.sides.path(index)
        ids = [*before, *one.ids][: left_at + 1] + [one.sides.ids[side] for side in path]
        pipeline.open(session, len(ids))
        found.append(pipeline.run(span(session, 0, ids, 1)))
        pipeline.drop(session)
    return np.concatenate(found) if found else np.zeros((0, 0), np.float32)
