"""Trees of rows for tests: drawn at random, and what each row of them must compute."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from edge_runtime.engine.base import Rows, Span
from edge_runtime.engine.side_rows import SideRows
from tests.support.stages import Pipeline, span


def random_sides(rng: random.Random, base_row: int, count: int, most: int, vocab_size: int) -> SideRows:
    """Up to `most` side rows beside the chain of rows base_row .. base_row + count - 1."""
    ids: list[int] = []
    parents: list[int] = []
    for index in range(rng.randint(0, most)):
        chain = rng.randrange(max(base_row - 1, 0), base_row + count)
        parents.append(~rng.randrange(index) if index and rng.random() < 0.4 else chain)
        ids.append(rng.randrange(vocab_size))
    return SideRows(tuple(ids), tuple(parents))


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
