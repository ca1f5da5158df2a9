"""What others do, timed by the same costs: one token a loop, drafting in turns, and drafting beside one's own
verification (PEARL).

All get acceptance at every position independently, no queues, and the best fixed draft length in hindsight. Each is
there twice: played, draw by draw, and as the field's formula for its mean.

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


def loop_decoding(costs: Costs) -> float:
    """Tokens per second without drafts where every id goes round the loop: 1 / (R + Tv(1))."""
    return 1 / (costs.loop_delay_seconds + costs.verify_seconds(1))


def expected_ids(acceptance: float, length: int) -> float:
    """Of a round of `length` drafts, the target's own id included: (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023)."""
    if acceptance == 1.0:
        return length + 1.0
    return float((1 - acceptance ** (length + 1)) / (1 - acceptance))


def synchronous_rate(acceptance: float, length: int, draft_seconds: float, loop_seconds: float) -> float:
    """Tokens per second of rounds of `length` drafts, `loop_seconds` (delay and verification) after the last draft."""
    return expected_ids(acceptance, length) / (length * draft_seconds + loop_seconds)


def pearl_rate(costs: Costs, length: int) -> float:
    """Mean tokens per second of PEARL: a chain of two states, by the shares of rounds that begin in each.

    A round that begins dirty (after a miss) verifies one id and is clean afterwards with chance a; one that begins
    clean verifies `length` ids and stays clean with chance a^length. Each takes the longer of its two sides.
    """
    a, k = costs.acceptance, length
    stays_clean = a**k
    clean = a / (1 - stays_clean + a)  # share of rounds: clean * (1 - a^k) = (1 - clean) * a

    def seconds(rows: int) -> float:
        return max(k * costs.draft_seconds, costs.loop_delay_seconds + costs.verify_seconds(rows))

    clean_ids = expected_ids(a, k) - stays_clean  # no id of the target's own where all were right
    ids = (1 - clean) * 1.0 + clean * clean_ids
    return ids / ((1 - clean) * seconds(1) + clean * seconds(k))


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
