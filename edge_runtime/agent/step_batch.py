"""A step's works as the batch that a stage runs, and its rows as what becomes of each work.

Knows: works, batches, how they map onto each other. Does not know: queues, threads, samplers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.agent.open_rows import chain_of
from edge_runtime.agent.pipeline_events import Event, Work, WorkFinished
from edge_runtime.engine.base import Batch, Rows, Span, Stage
from edge_runtime.engine.side_pages import pages_wanted


def placed(works: list[Work], stage: Stage) -> list[Work]:
    """Without side rows where memory is short, or the stage can't run them: they are worth no session's failure."""
    has_sides = [work for work in works if work.row_count > len(work.ids)]
    if has_sides and pages_wanted(batch_of(works).spans) > stage.spare_pages:
        return [chain_of(work) for work in works]
    return works


def batch_of(works: Sequence[Work]) -> Batch:
    spans = tuple(
        Span(work.session, work.base_row, work.ids, work.logit_rows, not work.bidirectional, work.sides)
        for work in works
    )
    hidden = [work.hidden for work in works if work.hidden is not None]
    return Batch(spans, (np.concatenate(hidden) if len(hidden) > 1 else hidden[0]) if hidden else None)


def split_rows(works: Sequence[Work], rows: Rows) -> list[Event]:
    events: list[Event] = []
    start = 0
    for work in works:
        end = start + work.row_count
        events.append(WorkFinished(work, rows[start:end]))
        start = end
    return events
