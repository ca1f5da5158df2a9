"""How many sessions decode together in one step of a stage, so that the other stages of its pipeline work meanwhile.

If all sessions go round as one group, every stage but one stands still. More groups keep more stages at work, but a
step of few rows costs nearly what a step of many does. A round of g groups takes as long as g steps here, and at least
one step here and everywhere else. Rows that once share a step come back together: a row that waits for company pays
once, and gains for as long as both decode. So it waits while there are more groups than there should be.

Only the first stage forms groups. The others take what has come, and wait no longer than a group's frames take to come
one after the other: two stages that both wait for company, or both divide, soon disagree, and each takes apart what the
other one has put together.

Knows: how long steps take, when sessions' rows went and came. Does not know: queues, clocks, other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_runtime.core import SessionId

MOST_GROUPS = 8
GAIN = 0.95  # of the time of a round, below which one more group is worth its trouble
COMPANY_STEPS = 1.5  # that a row waits for company, at most
FRAME_STEPS = 0.05  # that rows of a later stage wait for those they were last together with
ALONE_STEPS = 8  # without such waiting, at most, after one that was in vain: twice as many each time in a row
PATIENCE_SECONDS = 5.0  # away for longer: stuck, and nothing is learnt from it
WEIGHT = 0.2  # of the latest step, once there are as many as that takes
FADE, LEAST_HOPE = 0.01, 0.75  # a size that is not tried seems quicker with every step, down to that share
QUICK, SLOW = 0.3, 0.005  # towards the least time away (nobody else was in the way), and back from it
ALONE = 0.1  # back from it where there was nobody else: else noise alone would make it ever less


def group_size(sessions: int, step_seconds: Callable[[int], float], elsewhere: float) -> int:
    """Sessions of one step where so many decode, one row each.

    `step_seconds(n)`: of a step of n rows here. `elsewhere`: the time a group spends between two of its steps here, in
    steps of its own size: near 0 for a device alone, near 1 for one of two equal stages.
    """
    best, best_seconds = sessions, float("inf")
    for groups in range(1, min(sessions, MOST_GROUPS) + 1):
        size = -(-sessions // groups)
        step = step_seconds(size)
        seconds = max(-(-sessions // size) * step, (1 + elsewhere) * step)
        if seconds < GAIN * best_seconds:
            best, best_seconds = size, seconds
    return best


class _StepSeconds:
    """Of one size of steps."""

    def __init__(self) -> None:
        self._count = 0
        self.usual = 0.0
        self.steps_since = 0  # of larger sizes

    def add(self, seconds: float) -> None:
        self._count += 1
        self.usual += max(WEIGHT, 1 / self._count) * (seconds - self.usual)
        self.steps_since = 0

    @property
    def hope(self) -> float:
        """The share of its time that it is given while it is not tried: it may have been held up whenever it was."""
        return max(LEAST_HOPE, 1 - FADE * self.steps_since)


class DecodeGroups:
    """The sessions that decode here, how long their steps take, and how long they are away between two.

    `forms` False: of a later stage, which takes what has come.
    """

    def __init__(self, *, forms: bool = True) -> None:
        self._forms = forms
        self._steps: dict[int, _StepSeconds] = {}  # by number of sessions
        self._sessions: set[SessionId] = set()
        # End and number of sessions of each one's last step; 0 where other rows took part.
        self._ended: dict[SessionId, tuple[float, int]] = {}
        self._here: set[SessionId] = set()  # with a row that waits
        self._mates: dict[SessionId, frozenset[SessionId]] = {}  # of each one's last step
        self._elsewhere: float | None = None  # the least time away, in steps
        self._waiting_since: float | None = None  # for company
        self._waiting = 0  # sessions, when that began
        self._alone_steps = 1  # after the next one that is in vain
        self._alone_left = 0  # of those

    def came(self, session: SessionId, now: float) -> None:
        """With a decode row."""
        self._sessions.add(session)
        self._here.add(session)
        ended_at, sessions = self._ended.pop(session, (now, 0))
        if any(self._ended.get(mate, (None, 0))[0] == ended_at for mate in self._mates.get(session, ())):
            return  # a group is away until the last of it is back: another stage may have divided it
        if sessions and now - ended_at < PATIENCE_SECONDS:
            steps = (
                max(0.0, now - ended_at) / self._steps[sessions].usual
            )  # one held up says nothing of others
            before = steps if self._elsewhere is None else self._elsewhere
            back = (
                SLOW if sessions < len(self._sessions) else ALONE
            )  # other groups may have been in its way, or not
            self._elsewhere = before + (QUICK if steps < before else back) * (steps - before)

    def left(self, session: SessionId) -> None:
        self._sessions.discard(session)
        self._here.discard(session)
        self._ended.pop(session, None)
        self._mates.pop(session, None)

    def ended(self, sessions: Sequence[SessionId], seconds: float, now: float) -> None:
        """A step in which these decoded, one row each. `seconds`: its length; 0 where other rows took part."""
        if seconds > 0:
            self._took(len(sessions), seconds)
        together = frozenset(sessions)
        self._here -= together
        self._mates.update((session, together) for session in sessions if session in self._sessions)
        count = len(sessions) if seconds > 0 else 0
        self._ended.update((session, (now, count)) for session in sessions if session in self._sessions)
        self._learn_from_waiting(len(sessions) <= self._waiting)
        self._waiting_since = None

    def _took(self, sessions: int, seconds: float) -> None:
        self._steps.setdefault(sessions, _StepSeconds()).add(seconds)
        for size, steps in self._steps.items():
            steps.steps_since += size < sessions

    def _learn_from_waiting(self, is_alone: bool) -> None:
        if self._waiting_since is None:
            self._alone_left = max(0, self._alone_left - 1)
        elif is_alone:
            self._alone_left, self._alone_steps = self._alone_steps, min(ALONE_STEPS, 2 * self._alone_steps)
        else:
            self._alone_left, self._alone_steps = 0, 1

    def most(self) -> int | None:
        """Sessions of one step. None: all that are there."""
        if not self._forms or len(self._sessions) < 2 or self._elsewhere is None:
            return None
        return group_size(len(self._sessions), self._step_seconds, self._elsewhere)

    def company_seconds(self, waiting: int, now: float) -> float:
        """How long so many sessions that wait with a row wait for more. 0: they go."""
        if self._is_complete(waiting):
            return 0.0
        if self._waiting_since is None:
            self._waiting_since, self._waiting = now, waiting
        limit_steps = COMPANY_STEPS if self._forms else FRAME_STEPS
        return max(0.0, self._waiting_since + limit_steps * self._step_seconds(waiting) - now)

    def _is_complete(self, waiting: int) -> bool:
        if self._forms:
            return bool(self._alone_left) or self._are_enough(waiting)
        if waiting == 1:  # a group that was never together here is told from a single row by waiting
            return self._here >= self._sessions
        mates = frozenset[SessionId]().union(*(self._mates.get(session, ()) for session in self._here))
        return not (mates & self._sessions) - self._here

    def _step_seconds(self, sessions: int) -> float:
        """Between measured sizes on a straight line; beyond them as if more rows were free: then they are tried.

        Never more than a step of more rows takes: the smaller size was held up when it was measured.
        """
        less = max((size for size in self._steps if size <= sessions), default=0)
        more = min((size for size in self._steps if size >= sessions), default=0)
        if not less or not more:
            return self._known_seconds(less or more) if self._steps else 0.0
        share = (sessions - less) / max(1, more - less)
        return self._known_seconds(less) + share * (self._known_seconds(more) - self._known_seconds(less))

    def _known_seconds(self, sessions: int) -> float:
        least = min(steps.usual for size, steps in self._steps.items() if size >= sessions)
        return least * self._steps[sessions].hope

    def _are_enough(self, waiting: int) -> bool:
        """For a step: a whole group, or no more groups with those that are away than there should be."""
        size = self.most()
        if size is None or waiting >= size:
            return True
        away = {self._mates.get(each, frozenset((each,))) for each in self._sessions - self._here}
        return 1 + len(away) <= -(-len(self._sessions) // size)
