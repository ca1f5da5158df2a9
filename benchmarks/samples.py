"""Repeated measurements, taken in turns, and what is said of them.

Two programs are compared within one run, A B then B A, so that what else the machine does meets both alike; the ratio
is the median of the ratios of neighbours. Knows: numbers. Does not know: where they come from.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

Measure = Callable[[], Awaitable[float]]


async def in_turns(
    arms: Mapping[str, Measure],
    rounds: int,
    after_each: Callable[[str, float], None] = lambda name, value: None,
) -> dict[str, list[float]]:
    """Every arm once a round, in an order that turns round each time: nobody is always first."""
    names = list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            value = await arms[name]()
            found[name].append(value)
            after_each(name, value)
    return found


def ratio(found: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float | None:
    """Median over rounds of ours / theirs; None where one of them was not measured."""
    if not found.get(ours) or not found.get(theirs):
        return None
    return statistics.median(a / b for a, b in zip(found[ours], found[theirs], strict=True))


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed, an observed one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def listed(values: Sequence[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
