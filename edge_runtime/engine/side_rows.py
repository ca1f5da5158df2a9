"""Side rows: guesses beside a chain of rows, so that rows of one frame or span form a tree (docs/speculative.md).

A side row continues a row of the chain, the row before it, or an earlier side row. It is run once, leaves no keys and
values behind, and no later rows continue it.

Knows: who continues whom. Does not know: what rows contain, whether a guess is right, frames, KV memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SideRows:
    """`parents[i]`: a row number of the chain (from 0), or ~j for side row j < i.

    On the wire rows are numbered through (`numbered`, `parted`); here a side row's name does not change with the length
    of the chain beside it.
    """

    ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.parents):
            raise ValueError("side rows need a parent each")
        if any(parent < -index for index, parent in enumerate(self.parents)):
            raise ValueError("a side row continues one that is not before it")

    def __len__(self) -> int:
        return len(self.ids)

    def __bool__(self) -> bool:
        return bool(self.ids)

    def path(self, index: int) -> tuple[int, tuple[int, ...]]:
        """(row of the chain that it all continues, side rows from there to `index`, both included)."""
        above = [index]
        while self.parents[above[-1]] < 0:
            above.append(~self.parents[above[-1]])
        return self.parents[above[-1]], tuple(reversed(above))

    @property
    def depth(self) -> int:
        """Side rows of the longest path."""
        return max((len(self.path(index)[1]) for index in range(len(self))), default=0)

    def positions(self) -> tuple[int, ...]:
        """Of each one: its parent's plus one."""
        found: list[int] = []
        for parent in self.parents:
            found.append((parent if parent >= 0 else found[~parent]) + 1)
        return tuple(found)

    def child(self, parent: int, token_id: int) -> int | None:
        """The side row of this id that continues `parent`, named as in `parents`."""
        for index, (above, token) in enumerate(zip(self.parents, self.ids, strict=True)):
            if above == parent and token == token_id:
                return index
        return None

    def only(self, wanted: Sequence[bool]) -> tuple[SideRows, tuple[int, ...]]:
        """Those wanted whose parents stay, too; and which ones these are."""
        kept: list[int] = []
        for index, parent in enumerate(self.parents):
            if wanted[index] and (parent >= 0 or ~parent in kept):
                kept.append(index)
        name = {~old: ~new for new, old in enumerate(kept)}
        parents = (name.get(self.parents[index], self.parents[index]) for index in kept)
        return SideRows(tuple(self.ids[index] for index in kept), tuple(parents)), tuple(kept)

    def below(self, index: int, row: int) -> tuple[SideRows, tuple[int, ...]]:
        """What continues side row `index`, which is row `row` of the chain from now on; and which ones these are."""
        kept: list[int] = []
        name = {~index: row}
        for later in range(index + 1, len(self)):
            if self.parents[later] in name:
                name[~later] = ~len(kept)
                kept.append(later)
        parents = (name[self.parents[later]] for later in kept)
        return SideRows(tuple(self.ids[later] for later in kept), tuple(parents)), tuple(kept)

    def followed_by(self, more: SideRows) -> SideRows:
        """Both, those of `more` behind these."""
        shifted = (parent if parent >= 0 else parent - len(self) for parent in more.parents)
        return SideRows(self.ids + more.ids, self.parents + tuple(shifted))

    def numbered(self, base_row: int, count: int) -> tuple[int, ...]:
        """Parents as a frame has them, whose chain is rows base_row .. base_row + count - 1: side rows count on."""
        first = base_row + count
        return tuple(parent if parent >= 0 else first + ~parent for parent in self.parents)


NO_SIDES = SideRows()


def chain_length(base_row: int, parents: Sequence[int]) -> int:
    """Leading rows of a frame that each continue the one before."""
    for index, parent in enumerate(parents):
        if parent != base_row + index - 1:
            return index
    return len(parents)


def parted(base_row: int, parents: Sequence[int], ids: Sequence[int]) -> tuple[tuple[int, ...], SideRows]:
    """A frame's chain, and the side rows behind it. Raises ValueError where the parents make no such tree."""
    if len(parents) != len(ids):
        raise ValueError("a frame has one parent for each row")
    count = chain_length(base_row, parents)
    if count == len(ids):
        return tuple(ids), NO_SIDES
    names: list[int] = []
    for index, parent in enumerate(parents[count:]):
        if not max(base_row - 1, 0) <= parent < base_row + count + index:
            raise ValueError("a side row continues a row that is not before it in its frame")
        names.append(parent if parent < base_row + count else ~(parent - base_row - count))
    return tuple(ids[:count]), SideRows(tuple(ids[count:]), tuple(names))
