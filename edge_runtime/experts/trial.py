"""Whether something makes tokens faster here: found out while tokens are made, with it and without in turns.

Short blocks of tokens, off and on, are compared in pairs (off on, on off, …), since a machine's speed changes by a
third within a minute but little from one block to the next. The verdict is the median of the pairs. It starts off,
stays off unless the gain is clear, stays on unless there is none, ends early when it is a bad idea, and is tried again
ever more rarely.

Knows: seconds and bytes that others measured. Does not know: what is tried, clocks, what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from statistics import median


@dataclass(frozen=True, slots=True)
class TrialRules:
    """`win_gain` to switch on, `stay_gain` to stay on: shares of the time of a token."""

    warm_up_tokens: int = 256  # before the first trial: caches fill, and short answers are left alone
    block_tokens: int = 4
    pairs: int = 8
    win_gain: float = 0.03
    stay_gain: float = 0.0
    win_pairs: int = 6  # that must have gained, too, to switch on
    give_up_pairs: int = 3  # at least, before it ends early
    give_up_loss: float = 0.2  # and by so much
    again_tokens: int = 8192  # to the next trial; doubled with every one that changes nothing
    most_again_tokens: int = 131_072


class Phase(Enum):
    WAITING = "waiting"  # not tried yet, or tried: `Trial.says`
    TRYING = "trying"


class Trial:
    def __init__(self, name: str, rules: TrialRules | None = None) -> None:
        self.name = name
        self._rules = rules or TrialRules()
        self._phase = Phase.WAITING
        self._verdict = False
        self._says = "not tried yet"
        self._left_tokens = self._rules.warm_up_tokens
        self._again_tokens = self._rules.again_tokens
        self._block: list[float] = []  # seconds of its tokens
        self._half: float | None = None  # seconds a token of the pair's first block
        self._gains: list[float] = []
        self._read_bytes = [0, 0]  # off, on

    @property
    def is_on(self) -> bool:
        """For the coming token."""
        return self._is_on_block if self._phase is Phase.TRYING else self._verdict

    @property
    def is_trying(self) -> bool:
        return self._phase is Phase.TRYING

    @property
    def says(self) -> str:
        """What is done now, and why."""
        if self._phase is Phase.TRYING:
            return f"being tried ({len(self._gains)} of {self._rules.pairs} pairs)"
        return f"{'on' if self._verdict else 'off'}, {self._says}"

    def made(self, seconds: float, read_bytes: int, reason_not: str = "") -> None:
        """A token was made, as `is_on` said. `reason_not`: why no trial should begin now, if it should not."""
        if self._phase is Phase.TRYING:
            self._count(seconds, read_bytes)
            return
        self._left_tokens = max(0, self._left_tokens - 1)
        if self._left_tokens:
            return
        if not reason_not:
            self._begin()
        elif not self._verdict:
            self._says = f"not tried: {reason_not}"

    @property
    def _is_on_block(self) -> bool:
        """Pairs are off on, on off, off on, …"""
        is_second = self._half is not None
        return is_second != bool(len(self._gains) % 2)

    def _begin(self) -> None:
        self._phase = Phase.TRYING
        self._block, self._half, self._gains = [], None, []
        self._read_bytes = [0, 0]

    def _count(self, seconds: float, read_bytes: int) -> None:
        self._read_bytes[self._is_on_block] += read_bytes
        self._block.append(seconds)
        if len(self._block) < self._rules.block_tokens:
            return
        token_seconds = sum(self._block) / len(self._block)
        self._block = []
        if self._half is None:
            self._half = token_seconds
            return
        off, on = self._half, token_seconds
        if len(self._gains) % 2:
            off, on = on, off
        self._half = None
        self._gains.append(1.0 - on / off if off > 0 else 0.0)
        if len(self._gains) == self._rules.pairs or self._is_hopeless():
            self._end()

    def _is_hopeless(self) -> bool:
        """Half of the pairs so far lost much."""
        enough = len(self._gains) >= self._rules.give_up_pairs
        return enough and median(self._gains) < -self._rules.give_up_loss

    def _end(self) -> None:
        rules, gain, before = self._rules, median(self._gains), self._verdict
        self._phase = Phase.WAITING
        if before:
            self._verdict = gain >= rules.stay_gain
        else:
            self._verdict = (
                gain >= rules.win_gain and sum(each > 0 for each in self._gains) >= rules.win_pairs
            )
        tokens = 2 * rules.block_tokens * len(self._gains)
        word = "won" if self._verdict else "lost" if gain < 0 else "won only"
        more = self._read_bytes[True] - self._read_bytes[False]
        share = more / self._read_bytes[False] if self._read_bytes[False] else 0.0
        self._says = f"{word} {abs(gain):.0%} of the time over {tokens} tokens, with {share:+.0%} bytes read"
        if self._verdict != before:
            self._again_tokens = rules.again_tokens
        self._left_tokens = self._again_tokens
        self._again_tokens = min(2 * self._again_tokens, rules.most_again_tokens)
