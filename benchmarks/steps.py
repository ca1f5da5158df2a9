"""What the notes of timed agents say: compute of each stage, and what lies between the stages.

A hop is everything between the end of one stage's compute and the start of the next one's: handing over to the event
loop, encoding, encryption, loopback, decryption, the queue of the next compute thread. Knows: notes. Does not know:
how they were taken (`timed_agent.py`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timed_agent import RECORD


@dataclass(frozen=True)
class Step:
    begin: float
    end: float
    session: int
    base_row: int
    rows: int
    kv_committed_bytes: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def read_steps(path: Path) -> list[Step]:
    """A process that was killed may have left half a record."""
    data = path.read_bytes()
    whole = len(data) - len(data) % RECORD.size
    return [Step(*fields) for fields in RECORD.iter_unpack(data[:whole])]


def decode_steps(steps: Sequence[Step]) -> dict[tuple[int, int], Step]:
    """Steps of one row, by session and row."""
    return {(step.session, step.base_row): step for step in steps if step.rows == 1}


def row_hops(stages: Sequence[Sequence[Step]]) -> list[float]:
    """Seconds from each stage to the next, of decoding steps."""
    by_row = [decode_steps(steps) for steps in stages]
    return [
        there[key].begin - here[key].end
        for here, there in itertools.pairwise(by_row)
        for key in here.keys() & there.keys()
    ]


def ring_hops(stages: Sequence[Sequence[Step]]) -> list[float]:
    """Seconds from the tail back to stage 1: the row that was sampled begins there."""
    first, tail = decode_steps(stages[0]), decode_steps(stages[-1])
    hops = []
    for (session, row), step in tail.items():
        following = first.get((session, row + 1))
        if following is not None:
            hops.append(following.begin - step.end)
    return hops


def compute_seconds_per_token(stages: Sequence[Sequence[Step]]) -> float:
    """Mean compute of all stages together for one decoded row."""
    by_row = [decode_steps(steps) for steps in stages]
    rows = set.intersection(*(set(each) for each in by_row))
    return sum(each[row].seconds for each in by_row for row in rows) / max(1, len(rows))


def busy_share(steps: Sequence[Step]) -> float:
    """Of the time from the first step to the last, gaps of a second and more (between requests) left out."""
    gaps = [max(0.0, after.begin - before.end) for before, after in itertools.pairwise(steps)]
    busy = sum(step.seconds for step in steps)
    return busy / max(1e-9, busy + sum(gap for gap in gaps if gap < 1.0))


def described(steps: Sequence[Step]) -> str:
    """How many steps of each size, and their median length; how busy the stage was."""
    sizes = sorted({step.rows for step in steps})
    by_size = {rows: [step.seconds for step in steps if step.rows == rows] for rows in sizes}
    listed = [
        f"{len(seconds)} of {rows} ({1e3 * statistics.median(seconds):.1f} ms)"
        for rows, seconds in by_size.items()
    ]
    return f"busy {busy_share(steps):.0%}; steps and their rows: {', '.join(listed)}"
