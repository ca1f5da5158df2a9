"""A suffix tree over texts of ids: which ids followed a given run of ids, and how often.

Nodes are made when they are asked for: the node of a run of ids is the set of places where the run ends, its count the
size of that set, and a child the places after which that id stands. What is kept is the text and, for each id, the
list of its places, 8 bytes an id, where a tree of objects up to depth 64 takes kilobytes. Taking the last id away takes
the last place away, so going back is exact.

Knows: ids and counts. Does not know: requests, users, budgets of drafts.
Depth and counts as in SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.speculative.drafters.suffix_paths import SEPARATOR, Branch

Ids = NDArray[np.int32]
Places = NDArray[np.int64]

DEPTH = 64  # longest run that is matched
MOST_PLACES = 1024  # of one id, the latest: what bounds the work of a look-up
_FIRST_LOOK = 4  # ids compared at every place, before the rest is at those that are left
_PLACE_BYTES = 4.5  # with what arrays keep in reserve
_LIST_BYTES = 240  # of an id's list, its entry and its key


@dataclass(frozen=True, slots=True)
class Node:
    """Of a run of ids that was found. `count`: places where it ends; of a memory's last text the end is among them."""

    match_tokens: int
    count: int
    places: Places  # ascending; each has an id or a separator after it
    last_places: Places  # of these the ones where no longer run matches


@dataclass(frozen=True, slots=True)
class Continuation:
    """Ids after a node as a tree in topological order; `probabilities` given the parent, -1 as a parent: the node."""

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    probabilities: tuple[float, ...]
    match_tokens: int = 0  # of the node

    @property
    def score(self) -> float:
        """Sum over nodes of the estimated probability that it and all above it are right."""
        paths: list[float] = []
        for parent, probability in zip(self.parents, self.probabilities, strict=True):
            paths.append(probability * (paths[parent] if parent >= 0 else 1.0))
        return sum(paths)


class SuffixTree:
    """Grows and shrinks at its end (`append`, `truncate`), forgets at its beginning (`forget_before`)."""

    def __init__(self) -> None:
        self._text: Ids = np.empty(64, np.int32)
        self._length = 0
        self._places: dict[int, array[int]] = {}
        self.places_looked_at = 0  # work done by `find`, for whoever wants to see what it depends on

    def __len__(self) -> int:
        """Ids and separators held."""
        return self._length

    @property
    def memory_bytes(self) -> int:
        return self._text.nbytes + int(self._length * _PLACE_BYTES) + len(self._places) * _LIST_BYTES

    def ids(self) -> Ids:
        """The texts, each with its separator before it. A view."""
        return self._text[: self._length]

    # ------------------------------------------------------------ growing and shrinking

    def append(self, ids: Sequence[int]) -> None:
        end = self._length + len(ids)
        if end > len(self._text):
            self._text = np.concatenate([self.ids(), np.empty(max(end, 64), np.int32)])
        self._text[self._length : end] = ids
        for place, token in enumerate(ids, start=self._length):
            if token == SEPARATOR:
                continue
            places = self._places.get(token)
            if places is None:
                self._places[token] = array("i", (place,))
            else:
                places.append(place)
        self._length = end

    def truncate(self, length: int) -> None:
        """Take ids away from the end until `length` are left."""
        for token in reversed(self._text[length : self._length].tolist()):
            if token == SEPARATOR:
                continue
            places = self._places[token]
            places.pop()
            if not places:
                del self._places[token]
        self._length = min(length, self._length)

    def forget_before(self, first: int) -> None:
        """Take ids away from the beginning: the one at `first` becomes the first. Costs as much as `append`."""
        kept = self._text[first : self._length].tolist()
        self._text, self._length, self._places = np.empty(len(kept) + 64, np.int32), 0, {}
        self.append(kept)

    # ------------------------------------------------------------ looking up

    def find(self, tail: Ids, *, is_own_end: bool) -> Iterator[Node]:
        """Nodes of the last m ids of `tail`, longest first, one for each different set of places.

        Of the m with the same places only the largest is there: it allows the longest drafts. `is_own_end`: the text
        ends with `tail`; that place says nothing about what follows, and is not counted.
        """
        places = self._latest(int(tail[-1])) if len(tail) else np.empty(0, np.int64)
        if is_own_end:
            places = places[places < self._length - 1]
        self.places_looked_at += len(places)
        lengths = self._common_lengths(places, tail[-DEPTH:][::-1])
        ends_here = places == self._length - 1  # the memory's last text: nothing follows
        return (self._node(int(tokens), places, lengths, ends_here) for tokens in np.unique(lengths)[::-1])

    @staticmethod
    def _node(tokens: int, places: Places, lengths: Places, ends_here: NDArray[np.bool_]) -> Node:
        matched = lengths >= tokens
        return Node(
            tokens, int(matched.sum()), places[matched & ~ends_here], places[(lengths == tokens) & ~ends_here]
        )

    def _latest(self, token: int) -> Places:
        places = self._places.get(token)
        return np.array(places[-MOST_PLACES:] if places else (), np.int64)

    def _common_lengths(self, places: Places, backwards: Ids) -> NDArray[np.int64]:
        """How many ids up to each place agree with the tail, which is given backwards."""
        lengths = self._agreeing(places, backwards[:_FIRST_LOOK])
        longer = lengths == _FIRST_LOOK
        if longer.any() and len(backwards) > _FIRST_LOOK:
            lengths[longer] += self._agreeing(places[longer] - _FIRST_LOOK, backwards[_FIRST_LOOK:])
        return lengths

    def _agreeing(self, places: Places, backwards: Ids) -> NDArray[np.int64]:
        at = places[:, None] - np.arange(len(backwards))
        agree = (self._text[np.maximum(at, 0)] == backwards) & (at >= 0)
        return np.where(agree.all(axis=1), len(backwards), agree.argmin(axis=1))

    # ------------------------------------------------------------ going on from a node

    def best_path(
        self, nodes: Iterator[Node], allowance: Callable[[int], int], least_probability: float
    ) -> tuple[Continuation, Node] | None:
        """Of the `path` of each node the one with the largest score, the longer match's among equals.

        `nodes` come as `find` gives them. `allowance`: ids of a path by tokens of match, never more for fewer.
        """
        root = Branch()
        best, best_score = None, 0.0
        for node in nodes:
            allowed = allowance(node.match_tokens)
            if allowed <= best_score:
                break  # a score is at most the number of ids, and shorter matches allow fewer
            for place in node.last_places.tolist():
                after = self._text[place + 1 : min(place + 1 + allowed, self._length)]
                root.add(after.tolist(), place)
            ids, probabilities = root.path(node.count, allowed, least_probability)
            path = Continuation(ids, tuple(range(-1, len(ids) - 1)), probabilities)
            if path.score > best_score:
                best, best_score = (path, node), path.score
        return best

    def path(self, node: Node, most_tokens: int, least_probability: float) -> Continuation:
        """The most frequent child, its most frequent child, and so on, while the path's probability is not below."""
        ids: list[int] = []
        probabilities: list[float] = []
        path_probability = 1.0
        while len(ids) < most_tokens:
            child = next(iter(self._children(node)), None)
            if child is None:
                break
            token, node, probability = child
            path_probability *= probability
            if path_probability < least_probability:
                break
            ids.append(token)
            probabilities.append(probability)
        return Continuation(tuple(ids), tuple(range(-1, len(ids) - 1)), tuple(probabilities))

    def tree(self, node: Node, most_nodes: int, least_probability: float) -> Continuation:
        """The `most_nodes` nodes whose paths are most probable, in that order."""
        ids: list[int] = []
        parents: list[int] = []
        probabilities: list[float] = []
        order = 0  # among equals the older one first: parents before children, most frequent before others
        heap: list[tuple[float, int, int, float, int, Node]] = []

        def push(parent: int, path_probability: float, above: Node) -> None:
            nonlocal order
            for token, child, probability in self._children(above):
                path = path_probability * probability
                if path >= least_probability:
                    heapq.heappush(heap, (-path, order, token, probability, parent, child))
                    order += 1

        push(-1, 1.0, node)
        while heap and len(ids) < most_nodes:
            negative_path, _, token, probability, parent, child = heapq.heappop(heap)
            ids.append(token)
            parents.append(parent)
            probabilities.append(probability)
            push(len(ids) - 1, -negative_path, child)
        return Continuation(tuple(ids), tuple(parents), tuple(probabilities))

    def _children(self, node: Node) -> list[tuple[int, Node, float]]:
        """(id, node, probability), most frequent first, among equals the one seen last."""
        following = self._text[node.places + 1]
        counts = Counter(following[::-1].tolist())
        counts.pop(SEPARATOR, None)
        children = []
        for token, count in counts.most_common():
            places = node.places[following == token] + 1
            places = places[places < self._length - 1]
            children.append((token, Node(node.match_tokens + 1, count, places, places), count / node.count))
        return children
