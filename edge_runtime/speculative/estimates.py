"""What one drafting device has measured: acceptance by source and depth, loop, floor, draft and service times.

Every figure is an exponentially weighted mean (EWMA) of samples that `draft_loop` hands in; `Measured` is what the
controller decides on, a value.

Knows: samples and means. Does not know: where samples come from, or what follows from them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

NEW_SHARE = 0.1  # of a new sample in a mean
ACCEPTANCE_SHARE = 0.03  # verdicts are single bits, and need more of them
PRIOR_ACCEPTANCE = 0.7  # before the first verdict; worth PRIOR_VERDICTS of them
PRIOR_VERDICTS = 8
PRIOR_SECONDS = 0.02  # of a draft; of a turn of the ring ten times as much
DEPTHS = 6  # buckets of depth: 0, 1, 2-3, 4-7, 8-15, 16 and more
RECENT_LOOPS = 16


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

    def or_else(self, default: float) -> float:
        return self.value if self.count else default


def _prior() -> list[Mean]:
    return [Mean(ACCEPTANCE_SHARE, PRIOR_ACCEPTANCE, PRIOR_VERDICTS) for _ in range(DEPTHS)]


@dataclass(slots=True)
class Estimates:
    """Of one request; those of the last one are a good start for the next."""

    source: str = ""  # of the last proposal
    _acceptance: dict[str, list[Mean]] = field(default_factory=dict)
    _draft: dict[str, Mean] = field(default_factory=dict)
    _loops: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOOPS))
    _floor: Mean = field(default_factory=Mean)
    _link: Mean = field(default_factory=Mean)
    _service: Mean = field(default_factory=Mean)
    _rescue: Mean = field(default_factory=lambda: Mean(ACCEPTANCE_SHARE))
    _verdicts: int = 0

    def judged(self, source: str, depth: int, accepted: bool) -> None:
        means = self._acceptance.setdefault(source, _prior())
        means[depth_bucket(depth)].add(float(accepted))
        self._verdicts += 1

    def rescued(self, was: bool) -> None:
        self._rescue.add(float(was))

    def drafted(self, source: str, ids: int, seconds: float) -> None:
        self.source = source
        self._draft.setdefault(source, Mean()).add(seconds / max(1, ids))

    def looped(self, seconds: float) -> None:
        """From sending a draft to the sample of its row; the draft was in time and nothing was queued before it."""
        self._loops.append(seconds)

    def turned(self, seconds: float) -> None:
        """From a miss to the next id, which the target made by itself."""
        self._floor.add(seconds)

    def linked(self, seconds: float) -> None:
        """A round trip of the device's link."""
        self._link.add(seconds)

    def served(self, interval_seconds: float, *, queued: bool) -> None:
        """Between two verdicts in a row. With drafts queued before the target it is what a frame costs there.

        Without, it only says that a frame costs no more.
        """
        if queued:
            self._service.add(interval_seconds)
        elif self._service.count and interval_seconds < self._service.value:
            self._service = Mean(value=interval_seconds, count=1)

    @property
    def loop_seconds(self) -> float:
        """The middle of the last loops; until there are some, the link and one turn of the ring."""
        if self._loops:
            return sorted(self._loops)[len(self._loops) // 2]
        return self._link.value + self.floor_seconds

    @property
    def floor_seconds(self) -> float:
        return self._floor.or_else(10 * PRIOR_SECONDS)

    def measured(self) -> Measured:
        means = self._acceptance.get(self.source) or _prior()
        draft = self._draft.get(self.source, Mean()).or_else(PRIOR_SECONDS)
        return Measured(
            acceptance=_filled(means),
            loop_seconds=self.loop_seconds,
            floor_seconds=self.floor_seconds,
            draft_seconds=draft,
            service_seconds=self._service.or_else(0.0),
            rescue=self._rescue.or_else(0.0),
            verdicts=self._verdicts,
        )


def _filled(means: list[Mean]) -> tuple[float, ...]:
    """Depths that were never judged are as good as the one before."""
    values: list[float] = []
    for mean in means:
        judged = mean.count > PRIOR_VERDICTS or not values
        values.append(mean.value if judged else values[-1])
    return tuple(values)
