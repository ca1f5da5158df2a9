"""What one drafting device has measured: acceptance by source and depth, loop, floor, draft and service times.

Every figure is an exponentially weighted mean (EWMA) of samples that `draft_loop` hands in; `Measured` is what the
controller decides on, a value. How often a drafter is right when it says that it is so sure is kept, too (`odds`).

Knows: samples and means. Does not know: where samples come from, or what follows from them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

NEW_SHARE = 0.1  # of a new sample in a mean
ACCEPTANCE_SHARE = 0.006  # verdicts are single bits, and windows depend on high powers of them
PRIOR_ACCEPTANCE = 0.7  # before the first verdict; worth PRIOR_VERDICTS of them
PRIOR_VERDICTS = 8
DEPTH_PRIOR_VERDICTS = 64  # a depth is like the others until it has so many of its own
PRIOR_SECONDS = 0.02  # of a draft; of a turn of the ring ten times as much
DEPTHS = 6  # buckets of depth: 0, 1, 2-3, 4-7, 8-15, 16 and more
RECENT_LOOPS = 16
SCORE_EDGES = (
    0.2,
    0.4,
    0.6,
    0.8,
    0.9,
    0.96,
)  # drafters' own estimates are corrected in buckets between these
SCORE_SHARE = 0.01
ALL_SCORES = -1  # in the place of a bucket
CARRIED_VERDICTS = 32  # what verdicts of earlier requests count for at most: another text is another luck


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one session at one moment. Times in seconds.

    `acceptance[d]`: chance that a draft is right given that all before it were, by `depth_bucket`. `loop_seconds`: from
    sending a draft to the sample of its row, nothing queued. `floor_seconds`: from one id to the next that the target
    makes by itself. `draft_seconds`: of one id. `service_seconds`: of the slowest stage for one frame of one row;
    `service_row_seconds`: of one more row. `rescue`: chance that a miss is among the side rows.
    """

    acceptance: tuple[float, ...]
    loop_seconds: float
    floor_seconds: float
    draft_seconds: float
    service_seconds: float
    service_row_seconds: float = 0.0
    rescue: float = 0.0
    verdicts: int = 0


def depth_bucket(depth: int) -> int:
    """`depth`: drafts before this one that were not judged yet when it was made."""
    return min(depth.bit_length(), DEPTHS - 1)


@dataclass(slots=True)
class Mean:
    """An EWMA that starts as a plain mean, so that the first sample does not weigh for long."""

    share: float = NEW_SHARE
    value: float = 0.0
    count: int = 0

    def add(self, sample: float) -> None:
        self.count += 1
        self.value += (sample - self.value) * max(self.share, 1 / self.count)

    def carry(self, most_samples: int) -> None:
        """From now on what was sampled before counts for so many samples at most."""
        self.count = min(self.count, most_samples)

    def or_else(self, default: float) -> float:
        return self.value if self.count else default

    def with_prior(self, prior: float, samples: int) -> float:
        """`prior` counts for so many samples."""
        own = min(self.count, 1 / self.share)
        return (own * self.value + samples * prior) / (own + samples)


@dataclass(slots=True)
class Line:
    """y over x by least squares, samples weighted exponentially: what a frame costs, and each row of it."""

    share: float = NEW_SHARE
    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self._weight, self._x, self._y, self._xx, self._xy = (
            (1 - self.share) * old + new
            for old, new in zip(
                (self._weight, self._x, self._y, self._xx, self._xy), (1.0, x, y, x * x, x * y), strict=True
            )
        )

    @property
    def slope(self) -> float:
        """0 where x never differed, or y sank with it."""
        spread = self._weight * self._xx - self._x * self._x
        if spread <= 1e-9 * self._weight * self._xx:
            return 0.0
        return max(0.0, (self._weight * self._xy - self._x * self._y) / spread)

    def at(self, x: float) -> float:
        if not self._weight:
            return 0.0
        return max(0.0, (self._y + self.slope * (self._weight * x - self._x)) / self._weight)


def _no_verdicts() -> list[Mean]:
    """By depth, and last of all depths."""
    return [Mean(ACCEPTANCE_SHARE) for _ in range(DEPTHS + 1)]


@dataclass(slots=True)
class Estimates:
    """Of one request; those of the last one are a good start for the next."""

    source: str = ""  # of the last proposal
    _acceptance: dict[str, list[Mean]] = field(default_factory=dict)
    _draft: dict[str, Mean] = field(default_factory=dict)
    _loops: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOOPS))
    _waits: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOOPS))  # and bounds
    _floor: Mean = field(default_factory=Mean)
    _service: Line = field(default_factory=Line)
    _rescue: Mean = field(default_factory=lambda: Mean(ACCEPTANCE_SHARE))
    _scores: dict[tuple[str, int], Mean] = field(default_factory=dict)
    _verdicts: int = 0

    def begin(self) -> None:
        """Another request: times are those of the same devices, but acceptance is that of other text."""
        by_depth = [mean for means in self._acceptance.values() for mean in means]
        for mean in (*by_depth, *self._scores.values(), self._rescue):
            mean.carry(CARRIED_VERDICTS)

    def judged(self, source: str, depth: int, accepted: bool, score: float | None = None) -> None:
        """`score`: the drafter's own estimate that it was right, given that all before it were."""
        means = self._acceptance.setdefault(source, _no_verdicts())
        for mean in (means[depth_bucket(depth)], means[-1]):
            mean.add(float(accepted))
        if score is not None:
            for key in (bisect_right(SCORE_EDGES, score), ALL_SCORES):
                self._scores.setdefault((source, key), Mean(SCORE_SHARE)).add(float(accepted))
        self._verdicts += 1

    def acceptance(self, source: str) -> tuple[float, ...]:
        """By depth, as in `Measured`."""
        return _by_depth(self._acceptance.get(source) or _no_verdicts())

    def odds(self, source: str, score: float | None) -> float:
        """How much likelier than its source's others a draft is: what scores like this one's came to, over all.

        Before verdicts the drafter is believed: the middle of the bucket counts for PRIOR_VERDICTS of them.
        """
        if score is None:
            return 1.0
        bucket = bisect_right(SCORE_EDGES, score)
        edges = (0.0, *SCORE_EDGES, 1.0)
        middle = (edges[bucket] + edges[bucket + 1]) / 2
        alike, others = (self._scores.get((source, key)) or Mean() for key in (bucket, ALL_SCORES))
        return alike.with_prior(middle, PRIOR_VERDICTS) / others.with_prior(middle, PRIOR_VERDICTS)

    def rescued(self, was: bool) -> None:
        self._rescue.add(float(was))

    def drafted(self, source: str, ids: int, seconds: float) -> None:
        self.source = source
        self._draft.setdefault(source, Mean()).add(seconds / max(1, ids))

    def looped(self, seconds: float, *, is_bound: bool = False) -> None:
        """From sending a draft to the sample of its row; the draft was in time and nothing was queued before it.

        `is_bound`: it was sent more than once, and took so long at most.
        """
        if not is_bound:
            self._loops.append(seconds)
        self._waits.append(seconds)

    def turned(self, seconds: float) -> None:
        """From a miss to the next id, which the target made by itself."""
        self._floor.add(seconds)

    def served(self, interval_seconds: float, rows: int, *, queued: bool) -> None:
        """Between two verdicts in a row, the second one of so many rows.

        With drafts queued before the target (verdicts came slower than the drafts were sent) it is what a frame costs
        there. Without, it only says that a frame costs no more.
        """
        if queued or interval_seconds < self._service.at(rows):
            self._service.add(rows, interval_seconds)

    @property
    def loop_seconds(self) -> float:
        """The lower quartile of the last loops, as drafts may have queued in others; at first the target's own pace."""
        if self._loops:
            return sorted(self._loops)[len(self._loops) // 4]
        return self.floor_seconds

    @property
    def is_loop_measured(self) -> bool:
        return bool(self._waits)

    @property
    def slow_loop_seconds(self) -> float:
        """The upper quartile, bounds among them: what takes much longer was lost."""
        if self._waits:
            return sorted(self._waits)[-1 - len(self._waits) // 4]
        return self.loop_seconds

    @property
    def floor_seconds(self) -> float:
        return self._floor.or_else(10 * PRIOR_SECONDS)

    def measured(self) -> Measured:
        draft = self._draft.get(self.source, Mean()).or_else(PRIOR_SECONDS)
        return Measured(
            acceptance=self.acceptance(self.source),
            loop_seconds=self.loop_seconds,
            floor_seconds=self.floor_seconds,
            draft_seconds=draft,
            service_seconds=self._service.at(1),
            service_row_seconds=self._service.slope,
            rescue=self._rescue.or_else(0.0),
            verdicts=self._verdicts,
        )


def _by_depth(means: list[Mean]) -> tuple[float, ...]:
    """Each depth's own verdicts, and as DEPTH_PRIOR_VERDICTS more what all depths together came to."""
    overall = means[-1].with_prior(PRIOR_ACCEPTANCE, PRIOR_VERDICTS)
    return tuple(mean.with_prior(overall, DEPTH_PRIOR_VERDICTS) for mean in means[:-1])
