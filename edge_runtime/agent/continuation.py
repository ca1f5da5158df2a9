"""What follows a session's given rows: the ids that are committed, and those that were issued as rows.

Stage 1 and the tail keep one each and compare alike, so both learn of a wrong guess without being told
(docs/speculative.md). Row r consumes the id at position r; position p is committed once the tail has sampled it.

Knows: ids by position. Does not know: turns, frames, links, or who guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.core import Token


@dataclass(slots=True)
class Continuation:
    given: int  # rows of prompt and journalled ids: what is kept here begins at this position
    committed: list[int] = field(default_factory=list)  # of positions given, given + 1, ...
    issued: list[int] = field(default_factory=list)  # of rows given, given + 1, ..., run or queued

    @property
    def next_position(self) -> int:
        """The first position that nobody knows the id of."""
        return self.given + len(self.committed)

    @property
    def end(self) -> int:
        """One more than the last row issued, where any beyond the given ones was."""
        return self.given + len(self.issued)

    def commit(self, token_id: int) -> None:
        """The id at `next_position`. It never changes."""
        self.committed.append(token_id)

    def continued_by(self, tokens: Sequence[Token]) -> list[Token]:
        """Those at `next_position` and on; none where one before them was lost."""
        new = [token for token in tokens if token.position >= self.next_position]
        wanted = range(self.next_position, self.next_position + len(new))
        return new if [token.position for token in new] == list(wanted) else []

    def issue(self, base_row: int, ids: Sequence[int]) -> None:
        """Rows base_row .. take the place of whatever was there and after."""
        del self.issued[max(0, base_row - self.given) :]
        self.issued.extend(ids[max(0, self.given - base_row) :])

    def cut(self, row: int) -> None:
        """Rows from `row` on count for nothing."""
        del self.issued[max(0, row - self.given) :]

    def departs(self, start: int) -> int:
        """The first position from `start` on where rows issued and committed ids differ, or one of them ends."""
        at = start - self.given
        end = min(len(self.committed), len(self.issued))
        while at < end and self.committed[at] == self.issued[at]:
            at += 1
        return self.given + at

    def contradicts(self, base_row: int, ids: Sequence[int]) -> int | None:
        """The first position of ids at base_row .. whose committed id is another one."""
        start = max(base_row, self.given)
        for position in range(start, min(base_row + len(ids), self.next_position)):
            if ids[position - base_row] != self.committed[position - self.given]:
                return position
        return None

    def sure(self, start: int) -> tuple[int, ...]:
        """Committed ids from position `start` on."""
        return tuple(self.committed[start - self.given :])
