"""The most frequent path after runs of every length at once, for work that does not grow with their number.

Places of a longer match are among those of a shorter one. So the places of each length are added to one tree of what
followed, which keeps counts and the most frequent child of every branch, and a length's path is read off it. In a text
that loops there are dozens of lengths with hundreds of places each; `SuffixTree.path` for each of them is the
reference, and took most of the time of a draft there.

Knows: counts of what followed. Does not know: texts, requests, how long a draft may be.
"""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = -1  # before every text: no run reaches across


class Branch:
    """What followed one run of ids: how often each id did, and what came after it."""

    __slots__ = ("children", "count", "head", "head_id", "place")

    def __init__(self) -> None:
        self.count = 0
        self.place = -1  # the last one that it was seen at
        self.children: dict[int, Branch] = {}
        self.head: Branch | None = None  # most frequent child, among equals the one seen last
        self.head_id = SEPARATOR

    def add(self, following: Sequence[int], place: int) -> None:
        """One more place, and the ids after it; ids after a separator belong to another text."""
        branch = self
        for token in following:
            if token == SEPARATOR:
                return
            child = branch.children.get(token)
            if child is None:
                child = branch.children[token] = Branch()
            child.count += 1
            child.place = max(child.place, place)
            head = branch.head
            if head is None or (child.count, child.place) > (head.count, head.place):
                branch.head, branch.head_id = child, token
            branch = child

    def path(
        self, count: int, most_tokens: int, least_probability: float
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """(ids, their probabilities) from here, `count` places, while the path's probability is not below the least."""
        ids: list[int] = []
        probabilities: list[float] = []
        path_probability = 1.0
        branch, head = self, self.head
        while len(ids) < most_tokens and head is not None:
            probability = head.count / count
            path_probability *= probability
            if path_probability < least_probability:
                break
            ids.append(branch.head_id)
            probabilities.append(probability)
            branch, count = head, head.count
            head = branch.head
        return tuple(ids), tuple(probabilities)
