"""Suffix drafts or the model's, at each step: whichever expects more ids to be right.

The suffix drafter's answer is nearly free, so it is asked first; it is taken iff the sum of its estimated
probabilities is at least what the model's drafts have been bringing (SuffixDecoding, arXiv 2411.04975, has a fixed
score there). Which drafts were right shows at the next `rewind`: those before it stood, the one at it did not.

Knows: both drafters, where each one's drafts lie. Does not know: noise, links, windows.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.drafters.base import Drafter, Proposal

LOOK_AHEAD = 8  # ids: what goes on for long is worth following even where its first id is not the likeliest
FIRST_GUESS = 0.6  # of the model's acceptance, before anything was seen
_FIRST_WEIGHT = 8.0  # drafts that the first guess counts for
_MEMORY = 0.98  # per judged draft: some fifty count


class Acceptance:
    """Share of one source's drafts that were right, recent ones counting more; drafts after a miss don't count."""

    def __init__(self) -> None:
        self._right = FIRST_GUESS * _FIRST_WEIGHT
        self._judged = _FIRST_WEIGHT

    @property
    def rate(self) -> float:
        return self._right / self._judged

    def judged(self, *, is_right: bool) -> None:
        self._right = self._right * _MEMORY + is_right
        self._judged = self._judged * _MEMORY + 1.0

    def expected_of(self, count: int) -> float:
        """Ids of a chain of `count` that are right before the first miss."""
        return sum(self.rate**depth for depth in range(1, count + 1))


class Chooser:
    source = "auto"

    def __init__(self, model: Drafter, suffix: Drafter) -> None:
        self._model = model
        self._suffix = suffix
        self._length = 0
        self._last: Proposal | None = None  # at the sequence's end
        self._drafts: dict[int, str] = {}  # position -> source, of drafts not judged yet, ascending
        self._acceptance = {model.source: Acceptance(), suffix.source: Acceptance()}

    @property
    def memory_bytes(self) -> int:
        return self._model.memory_bytes + self._suffix.memory_bytes

    def acceptance_of(self, source: str) -> float:
        return self._acceptance[source].rate

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """What was learnt about the model's acceptance stays: it is the same model."""
        self._length, self._last, self._drafts = len(prompt_ids), None, {}
        for drafter in (self._model, self._suffix):
            drafter.begin(prompt_ids, sampling)

    def extend(self, ids: Sequence[int]) -> None:
        if self._last is not None:
            guessed = self._last.ids[: self._last.chain_length]
            for offset, (token, guess) in enumerate(zip(ids, guessed, strict=False)):
                if token != guess:
                    break
                self._drafts[self._length + offset] = self._last.source
        self._length += len(ids)
        self._last = None
        for drafter in (self._model, self._suffix):
            drafter.extend(ids)

    def rewind(self, length: int) -> None:
        if length < self._length:
            self._judge(length)
        self._length, self._last = length, None
        for drafter in (self._model, self._suffix):
            drafter.rewind(length)

    def propose(self, count: int, width: int = 1) -> Proposal:
        """`source` of the proposal is that of the drafter that made it."""
        ahead = max(count, LOOK_AHEAD)
        found = self._suffix.propose(ahead, width)
        model = self._acceptance[self._model.source]
        if not found.ids or found.expected_accepted < model.expected_of(ahead):
            found = self._model.propose(count, width)
        found = found.first(count)
        self._last = found
        return found

    def end(self, *, learn: bool = True) -> None:
        self._judge(self._length)  # what is left of the sequence was committed
        self._length, self._last = 0, None
        for drafter in (self._model, self._suffix):
            drafter.end(learn=learn)

    def close(self) -> None:
        self._model.close()
        self._suffix.close()

    def _judge(self, miss: int) -> None:
        """Drafts before `miss` stood, the one at it did not, later ones were never looked at."""
        for position, source in self._drafts.items():
            if position <= miss:
                self._acceptance[source].judged(is_right=position < miss)
        self._drafts = {}
