"""What became of the rows that stages ran: which were of no use, and which were begun although that could be known.

    {"began": s, "ended": s,
     "works": [[session, base row, is prompt, ids, ids of side rows, their parents], …],
     "sampled": [[session, position, id], …]}

is one step of one agent, as `timed_agent.py` notes it. A row is late where a step began with it although the tail had
sampled another id at a position of the row's own past so long before that a cancel could have been there: the link's
delay, and nothing for sending and reading it.

Knows: steps as noted, links' delays. Does not know: how steps are noted, requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one session in one step: the chain from `base_row`, then side rows, each with its parent row.

    A side row's own number goes on from the chain's; a parent below `base_row` + chain is a row of the chain.
    """

    session: int
    base_row: int
    is_prompt: bool
    ids: tuple[int, ...]
    side_ids: tuple[int, ...] = ()
    side_parents: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.ids) + len(self.side_ids)


@dataclass(frozen=True, slots=True)
class Noted:
    began: float
    ended: float
    works: tuple[Work, ...]
    sampled: tuple[tuple[int, int, int], ...]  # session, position, id


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Of rows that no prompt gave."""

    run: int = 0
    late: int = 0


def read_notes(path: Path) -> list[Noted]:
    """A process that was killed may have left half a line."""
    return list(_read(path.read_text().splitlines()))


def _read(lines: Sequence[str]) -> Iterator[Noted]:
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            return
        works = tuple(Work(s, b, p, tuple(i), tuple(c), tuple(q)) for s, b, p, i, c, q in one["works"])
        sampled = tuple((s, p, i) for s, p, i in one["sampled"])
        yield Noted(one["began"], one["ended"], works, sampled)


def sampled_at(tail: Sequence[Noted]) -> dict[tuple[int, int], tuple[int, float]]:
    """(session, position) -> (id, when the step that sampled it ended), the first time."""
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for step in tail:
        for session, position, token in step.sampled:
            found.setdefault((session, position), (token, step.ended))
    return found


def count_rows(
    steps: Sequence[Noted],
    known: Mapping[tuple[int, int], tuple[int, float]],
    delay_seconds: float,
    windows: Sequence[Window],
) -> RowCounts:
    """Rows of one agent in the windows. `delay_seconds`: from the tail to it."""
    run = late = 0
    pasts: dict[int, dict[int, int]] = {}  # by session: ids of rows, as this agent ran them last
    for step in steps:
        counts = any(begin <= step.began <= end for begin, end in windows)
        for work in step.works:
            ids = pasts.setdefault(work.session, {})
            ids.update(enumerate(work.ids, start=work.base_row))
            if work.is_prompt or not counts:
                continue
            run += work.rows
            first_wrong = _first_wrong(work, ids, known, step.began - delay_seconds)
            late += _late_rows(work, first_wrong, known, step.began - delay_seconds)
    return RowCounts(run, late)


def _first_wrong(
    work: Work,
    ids: Mapping[int, int],
    known: Mapping[tuple[int, int], tuple[int, float]],
    told_until: float,
) -> int | None:
    """The first row of the chain, or before it, whose id is another than a cancel would have said by then."""
    end = work.base_row + len(work.ids)
    wrong = None
    for row in range(end - 1, -1, -1):
        said = known.get((work.session, row))
        if said is None:
            if row < work.base_row:
                break  # rows below were given, or sampled by another session's tail
            continue
        token, seconds = said
        if row in ids and ids[row] != token and seconds < told_until:
            wrong = row
    return wrong


def _late_rows(
    work: Work,
    first_wrong: int | None,
    known: Mapping[tuple[int, int], tuple[int, float]],
    told_until: float,
) -> int:
    end = work.base_row + len(work.ids)
    late = 0 if first_wrong is None else end - max(first_wrong, work.base_row)
    positions: list[int] = []
    is_late: list[bool] = []
    for token, parent in zip(work.side_ids, work.side_parents, strict=True):
        above_is_side = parent >= end
        position = positions[parent - end] + 1 if above_is_side else parent + 1
        above_is_late = (
            is_late[parent - end] if above_is_side else first_wrong is not None and parent >= first_wrong
        )
        said = known.get((work.session, position))
        itself = said is not None and said[0] != token and said[1] < told_until
        positions.append(position)
        is_late.append(above_is_late or itself)
    return late + sum(is_late)
