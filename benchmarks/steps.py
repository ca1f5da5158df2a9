"""What the notes of timed agents say: compute of each stage, and what lies between the stages.

A hop is everything between the end of one stage's compute and the start of the next one's: handing over to the event
loop, encoding, encryption, loopback, decryption, the queue of the next compute thread. Knows: notes. Does not know:
how they were taken (`timed_agent.py`).
"""

from __future__ import annotations

import itertools
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
