"""Whether a peer is worth asking: how fast it was, and when one that was slow, late or gone is tried again.

Trying costs time, so it is paid from a share of the time that passes: about one part in a hundred.

Knows: seconds of work done, answers and failures. Does not know: clocks, links.
"""

from __future__ import annotations

from edge_runtime.experts.measured_line import MeasuredLine

SHARE_OF_TRIALS = 0.01  # of all time, that goes into looking whether something has become faster
LEAST_REST_SECONDS = 1.0  # of work, after a failure
MOST_DOUBLINGS = 6
LATE_FACTOR = 4.0  # times what was expected: the answer is not waited for any longer
LEAST_LATE_SECONDS = 0.02
MOST_LATE_SECONDS = 2.0
FIRST_LATE_SECONDS = 0.2  # where nothing is known yet
CHECKS = 3  # answers that must have had this device's own bits


class Trials:
    """When to look again at what is not used: after so much time that the look is a small share of it."""

    def __init__(self) -> None:
        self._passed_seconds = 0.0

    def passed(self, seconds: float) -> None:
        self._passed_seconds += seconds

    def used(self) -> None:
        self._passed_seconds = 0.0

    def is_due(self, cost_seconds: float) -> bool:
        return self._passed_seconds * SHARE_OF_TRIALS >= cost_seconds


class PeerStanding:
    """Of one peer. Counts are of uses (a row through an expert)."""

    def __init__(self) -> None:
        self.measured = MeasuredLine()
        self.is_barred = False  # for good: what it sends is wrong
        self._checks_left = CHECKS
        self._trials = Trials()
        self._failures = 0
        self._rest_seconds = 0.0

    @property
    def may_be_asked(self) -> bool:
        """In the ordinary way, where it is expected to be faster."""
        return self.is_checked and not self.is_barred and not self._failures

    @property
    def is_checked(self) -> bool:
        """It computes the bits of this device, as far as one can see."""
        return self._checks_left == 0

    def agreed(self, is_same: bool) -> None:
        """An answer was compared with what this device computes."""
        self._checks_left = max(0, self._checks_left - 1)
        self.is_barred = self.is_barred or not is_same

    def passed(self, seconds: float) -> None:
        """Of work in which it was not asked."""
        self._trials.passed(seconds)
        self._rest_seconds = max(0.0, self._rest_seconds - seconds)

    @property
    def is_due(self) -> bool:
        """It is worth a single request to see how it is now."""
        if self.is_barred or self._rest_seconds > 0:
            return False
        return (
            bool(self._failures) or not self.is_checked or self._trials.is_due(self.measured.line.seconds(1))
        )

    def late_seconds(self, uses: int) -> float:
        """How long an answer is waited for."""
        if not self.measured.observations:
            return FIRST_LATE_SECONDS
        expected = LATE_FACTOR * self.measured.line.seconds(uses)
        return min(max(expected, LEAST_LATE_SECONDS), MOST_LATE_SECONDS)

    def answered(self, uses: int, seconds: float, *, waited: bool = True) -> None:
        """Not `waited`: it was here before anybody looked, after `seconds` at most."""
        if not waited and self.measured.observations:
            seconds = min(seconds, self.measured.line.seconds(uses))
        self.measured.observe(uses, seconds)
        self._failures = 0
        self._trials.used()

    def failed(self, lost_seconds: float) -> None:
        """Late or gone; that took so long to find out."""
        rest_seconds = max(LEAST_REST_SECONDS, lost_seconds / SHARE_OF_TRIALS)
        self._rest_seconds = rest_seconds * 2 ** min(self._failures, MOST_DOUBLINGS)
        self._failures += 1
        self._trials.used()
