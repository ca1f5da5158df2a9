"""Drafting in turns, over the product's own link: send k drafts, wait for the verdict, draft again.

What most systems do (Leviathan et al. 2023, over a link), as the drafter's side of the same protocol: it stands where
`DraftLoop` stands, with the same drafters. The target goes on by itself while it waits, which helps this arm, too. k is
what the formula of `simulator/baselines.py` says is best for what was measured so far.

Knows: one window, the ids that settle it. Does not know: links, drafters, anything in flight beside that window.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.simulator.baselines import LENGTHS, synchronous_rate
from edge_runtime.sdk import draft_stream
from edge_runtime.speculative.draft_loop import Action, Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.wire import chain_frame

FIRST_ACCEPTANCE, FIRST_WEIGHT = 0.7, 8.0
FIRST_DRAFT_SECONDS, FIRST_LOOP_SECONDS = 0.004, 0.1
NEW_SHARE = 0.1


@dataclass(slots=True)
class Tally:
    """What this device has measured of its requests."""

    right: float = FIRST_ACCEPTANCE * FIRST_WEIGHT
    judged: float = FIRST_WEIGHT
    draft_seconds: float = FIRST_DRAFT_SECONDS
    loop_seconds: float = FIRST_LOOP_SECONDS

    @property
    def best_length(self) -> int:
        acceptance = min(0.99, self.right / self.judged)
        return max(
            LENGTHS,
            key=lambda k: synchronous_rate(acceptance, k, self.draft_seconds, self.loop_seconds),
        )


class SynchronousLoop:
    """Of the same shape as DraftLoop where the driver and the stream call it; what it needs no more is taken too."""

    tally = Tally()  # of all requests: a device's

    def __init__(
        self,
        prompt_length: int,
        max_rows: int,
        vocab_size: int,
        *_: object,
        stop_ids: Collection[int] = (),
        **__: object,
    ) -> None:
        self.length = prompt_length
        self.turn = 0
        self.finish = ""
        self.wake_at: float | None = None  # nothing is ever sent again
        self._first = prompt_length
        self._last_row = max_rows - 2
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._window: list[int] = []
        self._sent_seconds = 0.0
        self._ticket = 0
        self._asked_at: int | None = None  # position of the first id asked for
        self._since: list[int] = []  # committed since it was asked for

    def start(self, now_seconds: float) -> list[Action]:
        return []

    def passed(self, now_seconds: float) -> list[Action]:
        return []

    def link_lost(self, now_seconds: float) -> list[Action]:
        return []

    def link_resumed(self, now_seconds: float) -> list[Action]:
        return self._frame() if self._window else []

    def committed(
        self, position: int, ids: Sequence[int], now_seconds: float, finish: str = ""
    ) -> list[Action]:
        new = list(ids[self.length - position :])
        self.finish = finish or self.finish
        right = _common(self._window, new)
        was_open = bool(self._window)
        del self._window[:right]
        self.length += len(new)
        rest = tuple(new[right:])
        self.tally.right += right
        self.tally.judged += right + (was_open and bool(rest) and bool(self._window))
        actions: list[Action] = []
        if rest and self._window:
            self.turn = self.length - len(rest)
            self._window.clear()
            actions.append(Rewind(self.turn))
        if rest:
            actions.append(Extend(rest))
            self._since.extend(rest)
        if was_open and not self._window:
            self.tally.loop_seconds += NEW_SHARE * (
                now_seconds - self._sent_seconds - self.tally.loop_seconds
            )
        return [*actions, *self._ask()]

    def proposed(
        self, ticket: int, proposal: Proposal, began_seconds: float, ended_seconds: float
    ) -> list[Action]:
        at, self._asked_at = self._asked_at, None
        since, self._since = self._since, []
        ids = [each for each in proposal.ids[: proposal.chain_length] if each < self._vocab_size]
        if ids:
            seconds = (ended_seconds - began_seconds) / len(ids)
            self.tally.draft_seconds += NEW_SHARE * (seconds - self.tally.draft_seconds)
        if at is None or ids[: len(since)] != since:
            return self._ask() if ids else []
        ids = ids[len(since) : max(0, self._last_row + 1 - at)]
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), len(ids))
        if not ids[:end] or self.finish:
            return []  # it is asked again when the next id is known
        self._window, self._sent_seconds = ids[:end], ended_seconds
        return [*self._frame(), Extend(tuple(self._window))]

    def _ask(self) -> list[Action]:
        """Only where nothing is under way: that is the scheme."""
        is_busy = self._window or self._asked_at is not None or self.length == self._first
        if is_busy or self.finish or self.length > self._last_row:
            return []
        self._ticket += 1
        self._asked_at, self._since = self.length, []
        return [Propose(self._ticket, self.tally.best_length, 1)]

    def _frame(self) -> list[Action]:
        return [SendDrafts(chain_frame(self.turn, self.length, tuple(self._window)))]


@contextmanager
def in_turns() -> Iterator[None]:
    """Clients of this process draft in turns meanwhile."""
    module = vars(draft_stream)
    product = module["DraftLoop"]
    SynchronousLoop.tally = Tally()
    module["DraftLoop"] = SynchronousLoop
    try:
        yield
    finally:
        module["DraftLoop"] = product


def _common(window: Sequence[int], ids: Sequence[int]) -> int:
    pairs = zip(window, ids, strict=False)
    return next((i for i, (guess, token) in enumerate(pairs) if guess != token), min(len(window), len(ids)))
