"""The suffix drafter: what followed the last time these ids stood here, in this request or its user's past outputs.

SuffixDecoding (arXiv 2411.04975): for every length m of match with the end of the sequence, the draft may be as long
as m; the match whose draft has the largest sum of estimated probabilities wins, the longer one among equals.
Knows: one request's ids, one user's memory. Does not know: models, noise (it guesses text, not draws), verdicts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.drafters.base import ROOT, Proposal, no_proposal
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory
from edge_runtime.speculative.drafters.suffix_paths import SEPARATOR
from edge_runtime.speculative.drafters.suffix_tree import (
    DEPTH,
    Continuation,
    Ids,
    Node,
    SuffixTree,
)

DEFAULT_REQUEST_INDEX_BYTES = 4 << 20
_LEAST_INDEX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class SuffixOptions:
    """How long a match allows how long a draft: int(m * factor + offset). Paths less probable than `least` end."""

    factor: float = 1.0
    offset: float = 0.0
    least_probability: float = 0.1

    def allowance(self, match_tokens: int, count: int) -> int:
        return min(count, int(match_tokens * self.factor + self.offset + 1e-6))


class SuffixDrafter:
    source = "suffix"

    def __init__(
        self,
        memory: SuffixMemory | None = None,
        *,
        request_index_bytes: int = DEFAULT_REQUEST_INDEX_BYTES,
        options: SuffixOptions = SuffixOptions(),
    ) -> None:
        """Of a request whose index would take more than `request_index_bytes` the latest part is indexed."""
        self._memory = memory
        self._options = options
        self._budget_bytes = max(request_index_bytes, _LEAST_INDEX_BYTES)
        self._ids = array("i")
        self._prompt_tokens = 0
        self._tree = SuffixTree()
        self._first = 0  # the first id in the tree; a separator stands before it

    @property
    def memory_bytes(self) -> int:
        """With its user's memory, which outlives it."""
        shared = 0 if self._memory is None else self._memory.memory_bytes
        return self._tree.memory_bytes + 4 * len(self._ids) + shared

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._ids = array("i", prompt_ids)
        self._prompt_tokens = len(prompt_ids)
        self._index_from(0)

    def extend(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._tree.append(ids)
        self._bound()

    def rewind(self, length: int) -> None:
        del self._ids[length:]
        if length > self._first or self._first == 0:
            self._tree.truncate(1 + length - self._first)
        else:
            self._index_from(0)

    def propose(self, count: int, width: int = 1) -> Proposal:
        tail = np.array(self._ids[-DEPTH:], np.int32)
        if count < 1 or not len(tail):
            return no_proposal(self.source)
        return max(
            (proposal for proposal in self._candidates(tail, count, width)),
            key=lambda proposal: (
                proposal.expected_accepted
            ),  # the request's own among equals: max takes the first
            default=no_proposal(self.source),
        )

    def end(self, *, learn: bool = True) -> None:
        if learn and self._memory is not None:
            self._memory.learn(self._ids[self._prompt_tokens :])
        self._ids, self._prompt_tokens = array("i"), 0
        self._index_from(0)

    def close(self) -> None:
        self._tree = SuffixTree()

    # ------------------------------------------------------------ the request's index

    def _index_from(self, first: int) -> None:
        self._first = first
        self._tree = SuffixTree()
        self._tree.append([SEPARATOR, *self._ids[first:]])
        self._bound()

    def _bound(self) -> None:
        """Half of what fits: the next half need not be made room for."""
        if self._tree.memory_bytes > self._budget_bytes:
            fitting = int(len(self._tree) * self._budget_bytes / self._tree.memory_bytes)
            self._index_from(len(self._ids) - fitting // 2)

    # ------------------------------------------------------------ choosing a match

    def _candidates(self, tail: Ids, count: int, width: int) -> list[Proposal]:
        def choose(tree: SuffixTree, nodes: Iterator[Node]) -> Continuation | None:
            return self._best(tree, nodes, count, width)

        found = [choose(self._tree, self._tree.find(tail, is_own_end=True))]
        if self._memory is not None:
            found.append(self._memory.best(tail, choose))
        return [
            Proposal(best.ids, best.parents, best.probabilities, self.source, best.match_tokens)
            for best in found
            if best is not None and best.ids
        ]

    def _best(self, tree: SuffixTree, nodes: Iterator[Node], count: int, width: int) -> Continuation | None:
        options = self._options
        found = tree.best_path(
            nodes, lambda tokens: options.allowance(tokens, count), options.least_probability
        )
        if found is None:
            return None
        path, node = found
        wide = self._with_sides(tree, node, path, width) if width > 1 else path
        return replace(wide, match_tokens=node.match_tokens)

    def _with_sides(self, tree: SuffixTree, node: Node, chain: Continuation, width: int) -> Continuation:
        """The chain, then the most probable nodes beside it, at most `width` - 1 for each position of the chain."""
        wide = tree.tree(node, len(chain.ids) * width, self._options.least_probability)
        return beside(chain, wide, width)


def beside(chain: Continuation, wide: Continuation, width: int) -> Continuation:
    """`wide`'s nodes that `chain` lacks, behind it."""
    ids, parents, probabilities = list(chain.ids), list(chain.parents), list(chain.probabilities)
    place: dict[int, int] = {ROOT: ROOT}  # index in `wide` -> index in the result
    depth = {ROOT: 0}
    sides = [0] * (len(chain.ids) + 1)
    for index, (token, parent) in enumerate(zip(wide.ids, wide.parents, strict=True)):
        if parent not in place:
            continue
        above = place[parent]
        at = depth[parent] + 1
        if above < len(chain.ids) - 1 and chain.ids[above + 1] == token:
            place[index], depth[index] = above + 1, at
        elif at < len(sides) and sides[at] < width - 1:
            sides[at] += 1
            place[index], depth[index] = len(ids), at
            ids.append(token)
            parents.append(above)
            probabilities.append(wide.probabilities[index])
    return Continuation(tuple(ids), tuple(parents), tuple(probabilities))
