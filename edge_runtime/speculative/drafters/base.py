"""What a drafter must do: follow one request's ids and guess the next ones.

Knows: ids, sampling parameters, and how sure a guess is. Does not know: links, verdicts, windows, or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.core import SamplingParams

ROOT = -1  # as a parent: the last id the drafter was given


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guessed ids as a tree in topological order: the main chain first, then side nodes.

    `parents[i]` is the index of node i's parent, ROOT for those that follow the sequence. `probabilities[i]`: the
    drafter's own estimate that node i is right, given that its parent is; in 0 .. 1. Empty: it has no idea.
    """

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    probabilities: tuple[float, ...]
    source: str  # which drafter: acceptance is estimated by source and depth
    match_tokens: int = (
        0  # ids before the first node that were found elsewhere; 0 where a guess rests on none
    )

    @property
    def chain_length(self) -> int:
        """Leading nodes that each continue the one before."""
        return next((i for i, parent in enumerate(self.parents) if parent != i - 1), len(self.parents))

    def beside(self, index: int) -> tuple[tuple[int, float], ...]:
        """(id, probability) of side nodes that guess the same position as node `index` of the chain."""
        return tuple(
            (self.ids[side], self.probabilities[side])
            for side in range(self.chain_length, len(self.ids))
            if self.parents[side] == index - 1
        )

    def first(self, count: int) -> Proposal:
        """Of the chain only `count` ids, and what stands beside them."""
        if count >= self.chain_length:
            return self
        kept = list(range(count))
        place = {ROOT: ROOT, **{index: index for index in kept}}
        for side in range(self.chain_length, len(self.ids)):
            if self.parents[side] in place and self.parents[side] != count - 1:
                place[side] = len(kept)
                kept.append(side)
        return Proposal(
            ids=tuple(self.ids[index] for index in kept),
            parents=tuple(place[self.parents[index]] for index in kept),
            probabilities=tuple(self.probabilities[index] for index in kept),
            source=self.source,
            match_tokens=self.match_tokens,
        )

    @property
    def expected_accepted(self) -> float:
        """Ids of the chain that are right, by the drafter's own estimate: each needs all before it."""
        total, path = 0.0, 1.0
        for probability in self.probabilities[: self.chain_length]:
            path *= probability
            total += path
        return total


def no_proposal(source: str) -> Proposal:
    return Proposal((), (), (), source)


class Drafter(Protocol):
    """Serves one request at a time. Not thread-safe; `driver` calls it on a thread of its own."""

    source: str

    @property
    def memory_bytes(self) -> int:
        """What it holds now: weights, KV and trees."""
        ...

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """A new request; `sampling` with the seed the target uses (temperature 0: greedy)."""
        ...

    def extend(self, ids: Sequence[int]) -> None:
        """These ids follow the sequence: drafts that were sent, or committed ids."""
        ...

    def rewind(self, length: int) -> None:
        """Keep the first `length` ids (prompt included), forget the rest."""
        ...

    def propose(self, count: int, width: int = 1) -> Proposal:
        """At most `count` ids of main chain after the sequence, with up to `width` - 1 side nodes per position.

        Does not extend the sequence. Position of the first: the sequence's length.
        """
        ...

    def end(self, *, learn: bool = True) -> None:
        """The request is over; the sequence holds what was committed. `learn`: it may be remembered for its user."""
        ...

    def close(self) -> None: ...
