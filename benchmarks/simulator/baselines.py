"""What others do, timed by the same costs: drafting in turns, and drafting beside one's own verification (PEARL).

Both get acceptance at every position independently, no queues, and the best fixed draft length in hindsight.

Knows: `Costs`. Does not know: frames, stages, our own protocol.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True, slots=True)
class Costs:
    acceptance: float
    loop_delay_seconds: float
    draft_seconds: float
    verify_seconds: Callable[[int], float]  # of so many rows, through all stages


def synchronous(costs: Costs, length: int, tokens: int, rng: random.Random) -> float:
    """Tokens per second: draft `length` ids, send them, wait for the verdict (Leviathan et al. 2023, over a link)."""
    seconds, committed = 0.0, 0
    while committed < tokens:
        seconds += length * costs.draft_seconds + costs.loop_delay_seconds + costs.verify_seconds(length + 1)
        committed += _accepted(costs.acceptance, length, rng) + 1
    return committed / seconds


def pearl(costs: Costs, length: int, tokens: int, rng: random.Random) -> float:
    """Tokens per second: the next `length` ids are drafted while the last ones are verified (PEARL, ICLR 2025).

    After a miss only the first of the ids being drafted is verified meanwhile (pre-verify); while all are right the
    drafts go on (post-verify). Every round takes as long as the longer of the two sides.
    """
    seconds, committed, is_clean = 0.0, 0, False
    while committed < tokens:
        rows = length if is_clean else 1
        verify = costs.loop_delay_seconds + costs.verify_seconds(rows)
        seconds += max(length * costs.draft_seconds, verify)
        accepted = _accepted(costs.acceptance, rows, rng)
        is_clean, missed = accepted == rows, accepted < rows
        committed += accepted + missed
    return committed / seconds


def best(
    scheme: Callable[[Costs, int, int, random.Random], float], costs: Costs, tokens: int = 4000
) -> tuple[float, int]:
    """(tokens per second, draft length) of the best fixed length."""
    return max((scheme(costs, length, tokens, random.Random(length)), length) for length in LENGTHS)


def _accepted(acceptance: float, count: int, rng: random.Random) -> int:
    for index in range(count):
        if rng.random() >= acceptance:
            return index
    return count
