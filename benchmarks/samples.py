"""Repeated measurements, taken in turns, and what is said of them.

Two programs are compared within one run, A B then B A, so that what else the machine does meets both alike; the ratio
is the median of the ratios of neighbours. A sample beside which other programs kept the machine busy is taken again, a
few times. Knows: arms, turns, numbers. Does not know: what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.other_work import QUIET_CORES, OtherWork, Patience
from benchmarks.report import say

Measure = Callable[[], Awaitable[float]]

TRIES = 4
NO_PATIENCE = Patience(0.0)


@dataclass(frozen=True)
class Sample:
    value: float
    begin: float  # on the machine's monotonic clock
    end: float
    other_cores: float  # that programs which are not ours kept busy

    @property
    def is_quiet(self) -> bool:
        return self.other_cores <= QUIET_CORES


@dataclass(frozen=True)
class Samples:
    """By arm, one a round. An arm nobody measured has none."""

    by_arm: Mapping[str, Sequence[Sample]]

    def values(self, arm: str) -> list[float]:
        return [sample.value for sample in self.by_arm.get(arm, ())]

    def median(self, arm: str) -> float | None:
        """Of the quiet samples, where there are any."""
        samples = self.by_arm.get(arm, ())
        return median([sample.value for sample in samples if sample.is_quiet] or self.values(arm))

    def ratio(self, ours: str, theirs: str) -> float | None:
        """Median over rounds of ours / theirs, over quiet rounds where there are any; None where one has no samples."""
        return self.compared(ours, theirs, lambda a, b: a / b)

    def compared(self, ours: str, theirs: str, how: Callable[[float, float], float]) -> float | None:
        """The same of anything that is said of two neighbours."""
        pairs = list(zip(self.by_arm.get(ours, ()), self.by_arm.get(theirs, ()), strict=False))
        quiet = [(a, b) for a, b in pairs if a.is_quiet and b.is_quiet]
        return median([how(a.value, b.value) for a, b in quiet or pairs])

    def windows(self, arm: str) -> list[tuple[float, float]]:
        return [(sample.begin, sample.end) for sample in self.by_arm[arm]]

    @property
    def other_cores(self) -> float:
        """At the worst of the samples."""
        return max((sample.other_cores for each in self.by_arm.values() for sample in each), default=0.0)


async def in_turns(
    arms: Mapping[str, Measure], rounds: int, patience: Patience = NO_PATIENCE, *, tries: int = TRIES
) -> Samples:
    """Every arm once a round, in an order that turns round each time: nobody is always first."""
    names = list(arms)
    found: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(await quiet_sample(name, arms[name], patience, tries=tries))
    return Samples(found)


async def quiet_sample(
    name: str, measure: Measure, patience: Patience = NO_PATIENCE, *, tries: int = TRIES
) -> Sample:
    """The first sample that others left alone, else the one they disturbed least."""
    taken: list[Sample] = []
    for _ in range(tries):
        await patience.wait()
        begin, others = time.monotonic(), OtherWork()
        value = await measure()
        sample = Sample(value, begin, time.monotonic(), others.cores())
        taken.append(sample)
        said = "" if sample.is_quiet else f", beside other programs on {sample.other_cores:.2f} cores"
        say(f"{name}: {value:.4g}{said}")
        if sample.is_quiet:
            break
    return min(taken, key=lambda sample: sample.other_cores)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed, an observed one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def listed(values: Sequence[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
