"""What steps with prompt rows took lately, by their number of rows: how many rows fit into a given time.

Kernels compute rows in blocks, so that a step of three rows can take longer than one of four: small steps are looked up
one by one. Steps are held up more often than they are quick, and a size that counts as too slow is not measured any
more: so quick steps count for more than slow ones, and a size that was not seen for a while counts as what a row
usually takes.

Knows: rows, seconds. Does not know: what the rows are, who waits for them.
"""

from __future__ import annotations

FEW_ROWS = 4  # below, kernels read weights more than they compute: a row's share says nothing of more rows
MOST_LISTED = 16  # beyond, a row costs what it costs in larger steps
PROBE_STEPS = 256  # of fewer rows, after which more are tried: a row may have become cheaper
WEIGHT = 0.2  # of the latest measurement of a row
QUICKER, SLOWER = 0.3, 0.1  # likewise of a size, by what it said


class StepCosts:
    def __init__(self) -> None:
        self.row_seconds = 0.0  # a row's share of a step of FEW_ROWS and more; 0: not measured
        self._steps = 0
        self._measured_at = -PROBE_STEPS  # in steps: the last one of FEW_ROWS and more
        self._listed: dict[int, tuple[float, int]] = {}  # by rows: seconds, and the step that said so last

    @property
    def is_known(self) -> bool:
        """Whether a step of some rows was measured lately."""
        return self.row_seconds > 0 and self._steps - self._measured_at < PROBE_STEPS

    def took(self, rows: int, seconds: float) -> None:
        """A step with prompt rows, of `rows` in all."""
        self._steps += 1
        if rows <= MOST_LISTED:
            before = self._seconds_lately(rows)
            before = seconds if before is None else before
            weight = QUICKER if seconds < before else SLOWER
            self._listed[rows] = before + weight * (seconds - before), self._steps
        if rows < FEW_ROWS:
            return
        share = seconds / rows
        before = self.row_seconds if self.is_known else share
        self.row_seconds = before + WEIGHT * (share - before)
        self._measured_at = self._steps

    def rows_within(self, seconds: float) -> int:
        """The most rows, decode rows included, whose step is expected to take no longer. 0: none, or unknown."""
        if not self.row_seconds or seconds <= 0:
            return 0
        most = int(seconds / self.row_seconds)
        if most >= MOST_LISTED:
            return most
        candidates = range(min(MOST_LISTED, 2 * most + 2), 0, -1)
        return next((rows for rows in candidates if self.seconds(rows) <= seconds), 0)

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows, as expected."""
        lately = self._seconds_lately(rows)
        return rows * self.row_seconds if lately is None else lately

    def _seconds_lately(self, rows: int) -> float | None:
        seconds, step = self._listed.get(rows, (0.0, -PROBE_STEPS))
        return seconds if self._steps - step < PROBE_STEPS else None
