"""What matches of a length have been worth: the suffix drafter's probabilities, times how often they came true.

An id that stood once before has one continuation, which the tree calls certain, and on new code it is right less often
than not; after thirty ids that stood before it hardly ever is wrong. Which guesses were right shows at the next
`rewind`: those before it stood, the one at it did not, later ones were never looked at.

Knows: lengths of matches, verdicts. Does not know: trees, models, links.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.drafters.base import Drafter, Proposal

LENGTHS = (2, 3, 4, 6, 9, 13, 20, 32)  # of matches: where a bucket ends and the next begins
FIRST_WORTH = (0.35, 0.5, 0.6, 0.7, 0.78, 0.84, 0.88, 0.92, 0.95)  # before any verdict
_FIRST_WEIGHT = 6.0  # verdicts that it counts for
_MEMORY = 0.97  # per verdict of a bucket: some thirty count


class Worth:
    """Of matches of one length: guesses that came true, over those that were expected to."""

    def __init__(self, first: float) -> None:
        self._right = first * _FIRST_WEIGHT
        self._expected = _FIRST_WEIGHT

    @property
    def share(self) -> float:
        return min(1.0, self._right / self._expected)

    def judged(self, probability: float, *, is_right: bool) -> None:
        self._right = self._right * _MEMORY + is_right
        self._expected = self._expected * _MEMORY + probability


class Calibrated:
    """Around a drafter whose proposals rest on matches. What was learnt stays from request to request."""

    def __init__(self, inner: Drafter) -> None:
        self.source = inner.source
        self._inner = inner
        self._worth = [Worth(first) for first in FIRST_WORTH]
        self._length = 0
        self._last: Proposal | None = None  # at the sequence's end, as the inner drafter made it
        self._drafts: dict[int, tuple[int, float]] = {}  # position -> (match, probability), not judged yet

    @property
    def memory_bytes(self) -> int:
        return self._inner.memory_bytes

    def worth_of(self, match_tokens: int) -> float:
        return self._worth[bisect_right(LENGTHS, match_tokens)].share

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._length, self._last, self._drafts = len(prompt_ids), None, {}
        self._inner.begin(prompt_ids, sampling)

    def extend(self, ids: Sequence[int]) -> None:
        if self._last is not None:
            last = self._last
            guesses = zip(ids, last.ids[: last.chain_length], last.probabilities, strict=False)
            for offset, (token, guess, probability) in enumerate(guesses):
                if token != guess:
                    break
                self._drafts[self._length + offset] = (last.match_tokens + offset, probability)
        self._length += len(ids)
        self._last = None
        self._inner.extend(ids)

    def rewind(self, length: int) -> None:
        if length < self._length:
            self._judge(length)
        self._length, self._last = length, None
        self._inner.rewind(length)

    def propose(self, count: int, width: int = 1) -> Proposal:
        """Every node's probability, times what matches as long as its own have been worth."""
        found = self._last = self._inner.propose(count, width)
        depths: list[int] = []
        for parent in found.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        tried = tuple(
            probability * self.worth_of(found.match_tokens + depth)
            for probability, depth in zip(found.probabilities, depths, strict=True)
        )
        return replace(found, probabilities=tried)

    def end(self, *, learn: bool = True) -> None:
        self._judge(self._length)  # what is left of the sequence was committed
        self._length, self._last = 0, None
        self._inner.end(learn=learn)

    def close(self) -> None:
        self._inner.close()

    def _judge(self, miss: int) -> None:
        for position, (match_tokens, probability) in self._drafts.items():
            if position <= miss:
                worth = self._worth[bisect_right(LENGTHS, match_tokens)]
                worth.judged(probability, is_right=position < miss)
        self._drafts = {}
