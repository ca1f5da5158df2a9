"""Which queued rows go into the next step: decode rows first, then prompt chunks up to a budget, in turn.

Knows: work of each session, in order. Does not know: engines or threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from edge_runtime.agent.pipeline_events import Work
from edge_runtime.core import SessionId

MAX_DECODE_ROWS = 64  # of one step: beyond it a step gets slower for everyone without doing more per second


class RowQueue:
    """FIFO within a session, round-robin between sessions; a step takes at most one work of each."""

    def __init__(self, prefill_rows: int, *, shared: bool = True) -> None:
        """`prefill_rows` of prompt chunks per step; `shared` False runs every work in a step of its own."""
        self._prefill_rows = prefill_rows
        self._shared = shared
        self._works: OrderedDict[SessionId, deque[Work]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._works.values()))

    def add(self, work: Work) -> None:
        self._works.setdefault(work.session, deque()).append(work)

    def drop(self, session: SessionId) -> None:
        self._works.pop(session, None)

    def take(self) -> list[Work]:
        heads = [works[0] for works in self._works.values()]
        if not self._shared:
            chosen = heads[:1]
        else:
            decode = [work for work in heads if work.is_decode][:MAX_DECODE_ROWS]
            chosen = decode + self._chunks([work for work in heads if not work.is_decode])
        for work in chosen:
            works = self._works[work.session]
            works.popleft()
            if works:
                self._works.move_to_end(work.session)
            else:
                del self._works[work.session]
        return chosen

    def _chunks(self, heads: list[Work]) -> list[Work]:
        """At least one where there is one, so that nobody starves; then what fits beside it."""
        chosen: list[Work] = []
        rows = 0
        for work in heads:
            if chosen and rows + len(work.ids) > self._prefill_rows:
                break
            chosen.append(work)
            rows += len(work.ids)
        return chosen
