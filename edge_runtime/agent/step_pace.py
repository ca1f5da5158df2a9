"""How many prompt rows ride in a step, so that those who decode hardly notice a prompt being read.

A step with decode rows takes at most STRETCH times as long as it would without prompt rows, as measured here, on this
device, lately. While those rows are on other stages, this one would stand still for half of the time and more, so steps
of prompt rows alone run meanwhile: as many as end about when the next decode row is expected back (`away_time.py`). A
row that such a step held up has fewer prompt rows beside it then. What is too short for such a step is waited out: rows
that just missed a step pay for two.

Knows: when decode rows went and came. Does not know: clocks (times are given), queues, threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.agent.away_time import AwayTime
from edge_runtime.agent.decode_groups import DecodeGroups
from edge_runtime.agent.served_times import ServedTimes
from edge_runtime.agent.step_costs import FEW_ROWS, StepCosts
from edge_runtime.core import SessionId

STRETCH = 1.7  # promised is 2 at the 99th percentile: the rest is for what measuring misses
PATIENCE_SECONDS = 5.0  # without a decode row, after which those who decode count as stuck
SLACK = (
    0.2  # of a step of one decode row, by which a step of prompt rows may end later than that row is expected
)
WAIT_SECONDS = 0.002  # beyond the time that decode rows usually stay away
SEEN_SECONDS = 0.001  # what has arrived during a step is seen within so much of its end
FIRST_ROWS = 4  # before anything was measured
REFRESH_STEPS = 64  # a step without prompt rows now and then keeps the comparison honest
WEIGHT = 0.2  # of the latest measurement
QUICK, SLOW = 0.5, 0.05  # towards an extreme, and back from it


class StepPace:
    def __init__(self, *, forms_groups: bool = True) -> None:
        """`forms_groups`: of the sessions that decode; the first stage of a pipeline does."""
        self._alone: dict[int, float] = {}  # seconds of a step by number of decode rows (its power of two)
        self._costs = StepCosts()
        self._least_away = 0.0  # seconds from the end of a decode step to the next decode row
        self._most_away = 0.0
        self._decoded_at = float("-inf")  # end of the last step with decode rows
        self._decode_rows = 0  # of it
        self._fill_began = self._fill_ended = float("-inf")  # the last step without any
        self._since_refresh = 0  # steps with prompt rows since one without
        self._decoding: set[SessionId] = set()
        self.served = ServedTimes()
        self._away = AwayTime()
        self._due_at: float | None = None  # when rows were expected while the last step ran that had none
        self.groups = DecodeGroups(forms=forms_groups)

    # ------------------------------------------------------------ what happened

    def came(self, session: SessionId, now: float | None = None) -> None:
        """With a decode row, at `now` if that is known."""
        self._decoding.add(session)
        if now is not None:
            self.groups.came(session, now)
            self._away.came(session, now)

    @property
    def only_decoding(self) -> SessionId | None:
        """The session that decodes, where there is just one."""
        return next(iter(self._decoding)) if len(self._decoding) == 1 else None

    def left(self, session: SessionId) -> None:
        self._decoding.discard(session)
        self.groups.left(session)
        self._away.left(session)

    def began(self, decode_rows: int, came_at: float) -> None:
        """A step with decode rows begins; the first of them came at `came_at`."""
        if self._fill_began > self._decoded_at and came_at < self._fill_ended + SEEN_SECONDS:
            came_at = self._fill_began  # during that step, nobody knows when: not before it, in any case
        away = max(0.0, came_at - self._decoded_at)
        if decode_rows and away < PATIENCE_SECONDS:
            self._least_away += (QUICK if away < self._least_away else SLOW) * (away - self._least_away)
            self._most_away += (QUICK if away > self._most_away else SLOW) * (away - self._most_away)

    def ended(
        self,
        decode_rows: int,
        prompt_rows: int,
        seconds: float,
        now: float,
        sessions: Sequence[SessionId] = (),
    ) -> None:
        """`sessions`: whose decode rows took part, where each had one."""
        if sessions:
            is_plain = len(sessions) == decode_rows and not prompt_rows
            self.groups.ended(sessions, seconds if is_plain else 0.0, now)
            self._away.went((session for session in sessions if session in self._decoding), now)
        if decode_rows:
            self._decoded_at, self._decode_rows = now, decode_rows
            self._due_at = None
        else:
            self._due_at = self._away.next_at(now)
            self._away.filled(now)
            self._fill_began, self._fill_ended = now - seconds, now
        self.served.ended(decode_rows, prompt_rows, seconds, now, sessions)
        if not prompt_rows:
            key = decode_rows.bit_length()
            self._alone[key] = seconds + (1 - WEIGHT) * (self._alone.get(key, seconds) - seconds)
            self._since_refresh = 0
            return
        self._since_refresh += 1
        self._costs.took(decode_rows + prompt_rows, seconds)

    # ------------------------------------------------------------ what to do

    def pause_seconds(self, decode_rows: int, now: float, sessions: int | None = None) -> float:
        """How long to wait for decode rows before a step without any, or for company of those there are. 0: go.

        `sessions`: that wait with one decode row each; None: some have more.
        """
        if decode_rows and sessions is not None:
            return self.groups.company_seconds(sessions, now)
        if decode_rows or not self._others_decode(now) or self._rows_while_away(now):
            return 0.0
        margin = self._alone_seconds(self._decode_rows) or 0.0  # other stages take prompt rows along, too
        return max(0.0, self._decoded_at + 2 * self._most_away + margin + WAIT_SECONDS - now)

    def prompt_rows(self, decode_rows: int, now: float) -> int | None:
        """How many may ride in the step that begins now. None: nobody decodes, as many as are efficient."""
        if decode_rows:
            return self._rows_beside(decode_rows)
        if not self._others_decode(now):
            return None
        return self._rows_while_away(now) or max(FIRST_ROWS, self._rows_beside(self._decode_rows))

    def _others_decode(self, now: float) -> bool:
        return bool(self._decoding) and now - self._decoded_at < PATIENCE_SECONDS

    def _rows_beside(self, decode_rows: int) -> int:
        alone = self._alone_seconds(decode_rows)
        if alone is None or self._since_refresh >= REFRESH_STEPS:
            return 0
        if not self._costs.is_known:
            return FIRST_ROWS
        held_up = self._held_up_seconds()
        return max(0 if held_up else 1, self._costs.rows_within(STRETCH * alone - held_up) - decode_rows)

    def _held_up_seconds(self) -> float:
        """For which rows that decode may have waited for the last step, since it had none of them."""
        if self._due_at is None:
            return 0.0
        return max(0.0, self._fill_ended - max(self._due_at, self._fill_began))

    def _rows_while_away(self, now: float) -> int:
        """That a step can take until decode rows are back, or little longer; 0 where it is not worth it."""
        alone, due_at = self._alone_seconds(1), self._away.next_at(now)
        if alone is None:
            return 0
        if due_at is None:  # sessions that guess have several rows: nobody follows each of them
            left = self._decoded_at + 0.9 * self._least_away - now
            return 0 if left < 2 * alone else self._costs.rows_within(left)
        left = due_at - now
        rows = self._costs.rows_within(min(2 * left, left + SLACK * alone))
        return rows if rows >= FEW_ROWS else 0

    def _alone_seconds(self, decode_rows: int) -> float | None:
        """Of as many decode rows or fewer: never more than it would take."""
        known = [key for key in self._alone if 0 < key <= max(1, decode_rows.bit_length())]
        return self._alone[max(known)] if known else None
