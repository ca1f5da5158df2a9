"""Which queued rows go into the next step: decode rows first, then prompt rows as far as they are allowed, in turn.

A prompt's turn lasts TURN_ROWS rows, so that most prompts end in the order in which they came: if all were read alike,
the last chunks of a burst, and with them all first tokens, would come at its end.

Knows: work of each session, in order. Does not know: engines, threads, or how long rows take.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from edge_runtime.agent.open_rows import rescued
from edge_runtime.agent.pipeline_events import MAX_DECODE_ROWS, TURN_ROWS, CancelRows, Work
from edge_runtime.core import SessionId


class Waiting(NamedTuple):
    decode_rows: int  # that the next step would take
    decode_sessions: int | None  # that wait with one decode row each; None where one has several
    prompts: int  # sessions with prompt rows


class RowQueue:
    """FIFO within a session, turns between sessions; a step takes at most one work of each."""

    def __init__(self, prefill_rows: int, *, shared: bool = True) -> None:
        """`prefill_rows` of prompt chunks per step; `shared` False runs every work in a step of its own."""
        self.shared = shared
        self._prefill_rows = prefill_rows
        self._works: OrderedDict[SessionId, deque[Work]] = OrderedDict()
        self._turn_rows: dict[SessionId, int] = {}  # of prompts, in the turns that they have begun

    def __len__(self) -> int:
        return sum(map(len, self._works.values()))

    def __bool__(self) -> bool:
        return bool(self._works)

    def waiting(self) -> Waiting:
        """What stands first in each session's line."""
        decode_rows = sessions = prompts = several = 0
        for works in self._works.values():
            work = works[0]
            if work.is_decode:
                decode_rows += work.row_count
                sessions += 1
                several |= work.row_count > 1
            else:
                prompts += 1
        return Waiting(min(MAX_DECODE_ROWS, decode_rows), None if several else sessions, prompts)

    @property
    def decode_rows(self) -> int:
        """That the next step would take."""
        return self.waiting().decode_rows

    @property
    def decode_sessions(self) -> int | None:
        """That wait with one decode row each; None where one has several."""
        return self.waiting().decode_sessions

    def add(self, work: Work) -> None:
        """Guessed rows that follow each other wait as one work: many rows cost little more than one."""
        works = self._works.setdefault(work.session, deque())
        if works and work.continues(works[-1]) and works[-1].row_count + work.row_count <= MAX_DECODE_ROWS:
            work = work.joined(works.pop())
        works.append(work)

    def drop(self, session: SessionId) -> None:
        self._works.pop(session, None)
        self._turn_rows.pop(session, None)

    def cancel(self, order: CancelRows) -> None:
        kept = deque(still_wanted(self._works.get(order.session, ()), order))
        if kept:
            self._works[order.session] = kept
        else:
            self.drop(order.session)

    def take(self, prompt_rows: int | None = None, sessions: int | None = None) -> list[Work]:
        """`prompt_rows`: no more than so many, for which chunks are cut; None: whole chunks, at least one.

        `sessions`: no more than so many decode; None: as many as fit.
        """
        heads = [works[0] for works in self._works.values()]
        if not self.shared or (len(heads) == 1 and heads[0].is_decode):
            chosen = heads[:1]
        else:
            decode = _within([work for work in heads if work.is_decode][:sessions], MAX_DECODE_ROWS)
            prompts = [work for work in heads if not work.is_decode]
            chosen = decode + (
                self._chunks(prompts) if prompt_rows is None else self._cut(prompts, prompt_rows)
            )
        for work in chosen:
            self._took(work)
        return chosen

    def _chunks(self, heads: list[Work]) -> list[Work]:
        """At least one where there is one; then what fits beside it."""
        chosen: list[Work] = []
        rows = 0
        for work in heads:
            if chosen and rows + len(work.ids) > self._prefill_rows:
                break
            chosen.append(work)
            rows += len(work.ids)
        return chosen

    def _cut(self, heads: list[Work], rows: int) -> list[Work]:
        """Whoever's chunk is cut stays first in line until the rest of it has run."""
        chosen: list[Work] = []
        left = min(rows, self._prefill_rows)
        for work in heads:
            if left <= 0:
                break
            if len(work.ids) > left:
                if not work.is_divisible and chosen:
                    break
                if work.is_divisible:
                    work = self._split(work, left)
            chosen.append(work)
            left -= len(work.ids)
        return chosen

    def _split(self, work: Work, count: int) -> Work:
        works = self._works[work.session]
        piece, works[0] = work.split(count)
        works.appendleft(piece)
        return piece

    def _took(self, work: Work) -> None:
        works = self._works[work.session]
        works.popleft()
        if not works:
            self.drop(work.session)
            return
        turn_rows = self._turn_rows.get(work.session, 0) + work.row_count
        following = works[0]
        is_rest = (following.seq, following.base_row) == (work.seq, work.base_row + len(work.ids))
        if is_rest or (work.is_prompt and turn_rows < TURN_ROWS):
            self._turn_rows[work.session] = turn_rows
        else:
            self._turn_rows.pop(work.session, None)
            self._works.move_to_end(work.session)


def still_wanted(works: Iterable[Work], order: CancelRows) -> Iterable[Work]:
    """Those of the session's works that are not of an older turn, or that their side rows save."""
    for work in works:
        saved = work if work.turn >= order.turn else rescued(work, order.turn, order.known)
        if saved is not None:
            yield replace(saved, turn=max(work.turn, order.turn))


def _within(heads: list[Work], rows: int) -> list[Work]:
    """The first ones, of no more than so many rows together; the first one in any case."""
    for count, work in enumerate(heads):
        rows -= work.row_count
        if rows < 0 and count:
            return heads[:count]
    return heads
