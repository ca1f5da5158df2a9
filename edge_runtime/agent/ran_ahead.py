"""What became of a row that ran before its command came to the queue: the step takes it instead of running it again.

Knows: one row's result, when it ran. Does not know: what runs it, links, queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_runtime.agent.pipeline_events import Event, Rows, Work, WorkFinished
from edge_runtime.core import SessionId, Token


class RanAhead(NamedTuple):
    """Row `base_row` of a session, which consumed `token_id`. `rows` [1, E] of an inner stage, `tokens` of the tail."""

    session: SessionId
    base_row: int
    token_id: int
    began_at: float
    ended_at: float
    rows: Rows | None = None
    tokens: tuple[Token, ...] = ()
    problem: Exception | None = None  # which the step raises

    def events_of(self, works: Sequence[Work]) -> list[Event]:
        """As of a step of these works. Raises what running it raised."""
        if self.problem is not None:
            raise self.problem
        places = [(work.session, work.base_row, work.ids) for work in works]
        if places != [(self.session, self.base_row, (self.token_id,))]:
            raise RuntimeError(
                f"row {self.base_row} of session {self.session} ran, where {places} should have"
            )
        return [WorkFinished(works[0], self.rows, self.tokens)]
