"""What a stage says of itself: how long a step with one decoded row takes, and how long such a row is under way.

A round lasts from the end of one step of a session to the end of its next one, where nothing else ran in between: the
step, the other stages of the pipeline, and everything on the way. Knows: steps that ended. Does not know: clocks
(times are given), queues, who is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.core import SessionId

WEIGHT = 0.05  # of the latest time, once there are as many as that takes
PATIENCE_SECONDS = 5.0  # a round that takes longer stood still somewhere


class RunningMean:
    """Of all values while they are few, of the last 20 or so later."""

    def __init__(self) -> None:
        self._count = 0
        self.value = 0.0  # 0: there was none

    def add(self, value: float) -> None:
        self._count += 1
        self.value += max(WEIGHT, 1 / self._count) * (value - self.value)


class ServedTimes:
    def __init__(self) -> None:
        self._row, self._round = RunningMean(), RunningMean()
        self._last: tuple[SessionId, float] | None = (
            None  # the last step, if it had one decoded row and no other
        )

    @property
    def row_seconds(self) -> float:
        """Of a step with one decoded row and nothing else, lately; 0: there was none."""
        return self._row.value

    @property
    def round_seconds(self) -> float:
        """From one such step to the next of the same session, while nobody else had rows here; 0: there was none."""
        return self._round.value

    def ended(
        self, decode_rows: int, prompt_rows: int, seconds: float, now: float, sessions: Sequence[SessionId]
    ) -> None:
        """`sessions`: whose decode rows took part, where each had one."""
        before, self._last = self._last, None
        if decode_rows != 1 or prompt_rows:
            return
        self._row.add(seconds)
        if len(sessions) != 1:
            return
        self._last = sessions[0], now
        if before is not None and before[0] == sessions[0] and now - before[1] < PATIENCE_SECONDS:
            self._round.add(now - before[1])
