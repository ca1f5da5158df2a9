"""How long something takes by how much of it there is, as it was lately.

Exponentially weighted least squares of seconds over a count. Where the counts seen do not differ, the line goes through
the origin: seconds are then thought to grow with the count until something else is seen.

Knows: counts and seconds it is told. Does not know: clocks, what is measured.
"""

from __future__ import annotations

from edge_runtime.experts.miss_split import NOTHING, Line

DECAY = 15 / 16  # of what was seen before, at each observation
DECAY_FASTER = 1 / 2  # where it took less than half of what was expected: nothing is that fast by accident
MOST_AT_ONCE = 8.0  # times what was expected: one hiccup says little, several in a row say enough
_SEEN_ENOUGH = 4  # observations, before one of them may be a hiccup
_TOWARDS_ORIGIN = 0.02  # variance of the counts, over their squared mean, at which both views count alike


class MeasuredLine:
    def __init__(self) -> None:
        self.observations = 0
        self._weight = self._count = self._seconds = self._count_squared = self._product = 0.0
        self._line: Line | None = NOTHING

    def observe(self, count: int, seconds: float) -> None:
        """`count` at once, more than none, took so long."""
        expected_seconds = self.line.seconds(count)
        if self.observations >= _SEEN_ENOUGH and expected_seconds > 0:
            seconds = min(seconds, MOST_AT_ONCE * expected_seconds)
        self.observations += 1
        decay = DECAY_FASTER if 2 * seconds < expected_seconds else DECAY
        self._weight = self._weight * decay + 1
        self._count = self._count * decay + count
        self._seconds = self._seconds * decay + seconds
        self._count_squared = self._count_squared * decay + count * count
        self._product = self._product * decay + count * seconds
        self._line = None

    @property
    def line(self) -> Line:
        """NOTHING before the first observation."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> Line:
        count, seconds = self._count / self._weight, self._seconds / self._weight
        through_origin = seconds / count
        spread = max(0.0, self._count_squared / self._weight - count * count)
        together = self._product / self._weight - count * seconds
        prior = _TOWARDS_ORIGIN * count * count
        each = (together + prior * through_origin) / (spread + prior)
        each = min(max(0.0, each), through_origin)
        return Line(max(0.0, seconds - each * count), each)
