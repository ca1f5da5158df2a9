"""A target that many share: what drafts bring all of them, what they waste, and what one who floods costs the others.

Knows: crowds, and how rates of two of them compare. Does not know: how ids travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.simulator.crowd import Crowd, Target, User

ACCEPTANCES = (0.6, 0.74, 0.85, 0.93)
SESSIONS = (3, 8)
TARGETS = {
    "rows cost what steps cost": Target(),
    "rows cost little": Target(step_seconds=0.010, row_seconds=0.0005),
}
WARM_SECONDS = 2.0
FLOOD_FRAMES_PER_SECOND = 200.0


@dataclass(frozen=True, slots=True)
class Shared:
    """Of one crowd after `WARM_SECONDS`. Rates in tokens per second."""

    rates: tuple[float, ...]
    rows_per_second: float
    load: float

    @property
    def goodput(self) -> float:
        return sum(self.rates)

    @property
    def wasted_fraction(self) -> float:
        return max(0.0, 1 - self.goodput / self.rows_per_second)


def measure(users: Sequence[User], target: Target, seconds: float) -> Shared:
    crowd, rows = Crowd(users, target), [0]
    crowd.at(WARM_SECONDS, lambda: rows.__setitem__(0, crowd.rows_run))
    end = WARM_SECONDS + seconds
    crowd.run(end)
    rates = tuple(request.tokens_between(WARM_SECONDS, end) / seconds for request in crowd.requests.values())
    return Shared(rates, (crowd.rows_run - rows[0]) / seconds, crowd.load)


def figures(seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Under the names of the benchmark's JSON. Saturated: where the load is 1."""
    ratios, saturated = [], []
    for (name, target), sessions in product(TARGETS.items(), SESSIONS):
        plain = measure([User()] * sessions, target, seconds)
        for acceptance in ACCEPTANCES:
            drafted = measure([User(acceptance)] * sessions, target, seconds)
            ratios.append(drafted.goodput / plain.goodput)
            if drafted.load == 1.0:
                saturated.append((ratios[-1], drafted.wasted_fraction))
            say(
                f"{sessions} sessions, {name}, a={acceptance}, load {drafted.load}: {drafted.goodput:5.1f} tokens/s, "
                f"{ratios[-1]:.2f} x without drafts, rows wasted {drafted.wasted_fraction:.3f}"
            )
    beside_flood = flood(2 * seconds)
    say(f"beside one who floods: {beside_flood:.3f} of the rate beside one who does not draft")
    return {
        "sim_saturated_goodput_ratio_min": min(ratio for ratio, _ in saturated),
        "sim_saturated_wasted_rows_fraction": max(wasted for _, wasted in saturated),
        "sim_shared_goodput_ratio_min": min(ratios),
        "sim_beside_flood_fraction": beside_flood,
    }


def flood(seconds: float) -> float:
    """The lowest rate of those beside one who floods, of what it is beside one who does not draft."""
    worst = []
    for target in TARGETS.values():
        others = [User(), User(0.93), User()]
        calm = measure([*others, User()], target, seconds)
        wild = measure([*others, User(floods=FLOOD_FRAMES_PER_SECOND)], target, seconds)
        worst += [new / old for new, old in zip(wild.rates[:3], calm.rates[:3], strict=True)]
    return min(worst)
