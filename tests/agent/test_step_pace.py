"""Those who decode hardly notice a prompt, and the prompt gets through: stages simulated with a clock of their own."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from edge_runtime.agent.next_step import pause_seconds, take_step
from edge_runtime.agent.pipeline_events import Work
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.served_times import ServedTimes
from edge_runtime.agent.step_pace import StepPace
from edge_runtime.core import SessionId

PROMPT = SessionId(99)
CHUNK = 64
WINDOW = 4 * CHUNK


@dataclass
class SimulatedStage:
    """A step of n rows takes fixed + n * row seconds."""

    fixed_seconds: float
    row_seconds: float
    queue: RowQueue = field(default_factory=lambda: RowQueue(CHUNK))
    pace: StepPace = field(default_factory=StepPace)
    busy: bool = False
    came_at: float | None = None

    def seconds(self, rows: int) -> float:
        return self.fixed_seconds + rows * self.row_seconds


class Simulation:
    """Sessions that decode go round the stages; a prompt goes through them once, within a window."""

    def __init__(
        self, stages: list[SimulatedStage], hop_seconds: float, decoding: int, seed: int = 0
    ) -> None:
        self.stages = stages
        for stage in stages[1:]:
            stage.pace = StepPace(forms_groups=False)
        self.hop_seconds = hop_seconds
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.token_times: dict[int, list[float]] = {session: [] for session in range(decoding)}
        self.prompt_left = 0
        self.prompt_issued = self.prompt_through = 0
        self.prompt_done_at: float | None = None
        for session in range(decoding):
            self.at(session * 0.7e-3, lambda s=session: self.arrive(0, decode_row(s, 0)))

    def at(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), what))

    def run_until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = end

    def add_prompt(self, rows: int) -> None:
        self.prompt_left = rows
        self.prompt_done_at = None
        self.issue()

    def issue(self) -> None:
        while self.prompt_left and self.prompt_issued - self.prompt_through < WINDOW:
            count = min(CHUNK, self.prompt_left)
            ids = tuple(range(count))
            self.arrive(
                0, Work(1, PROMPT, 0, self.prompt_issued + 1, self.prompt_issued, ids, None, 0, False, True)
            )
            self.prompt_issued += count
            self.prompt_left -= count

    def arrive(self, place: int, work: Work) -> None:
        stage = self.stages[place]
        stage.queue.add(work)
        if work.is_decode:
            stage.pace.came(work.session, self.now)
            stage.came_at = self.now if stage.came_at is None else stage.came_at
        self.turn(place)

    def turn(self, place: int) -> None:
        stage = self.stages[place]
        pause = None if stage.busy else pause_seconds(stage.queue, stage.pace, self.now)
        if pause is None:
            return
        if pause > 0:
            self.at(pause + 1e-9, lambda: self.turn(place))
            return
        came_at = stage.came_at
        if stage.queue.decode_rows:
            stage.came_at = None
        works = take_step(stage.queue, stage.pace, self.now, came_at)
        assert works
        rows = sum(len(work.ids) for work in works)
        decode_rows = sum(work.is_decode for work in works)
        seconds = stage.seconds(rows)
        stage.busy = True
        self.at(seconds, lambda: self.step_ended(place, works, rows - decode_rows, seconds))

    def step_ended(self, place: int, works: list[Work], prompt: int, seconds: float) -> None:
        stage = self.stages[place]
        stage.busy = False
        sessions = [work.session for work in works if work.is_decode]
        stage.pace.ended(len(sessions), prompt, seconds, self.now, sessions)
        for work in works:
            if place + 1 < len(self.stages):
                self.at(self.hop_seconds, lambda w=work: self.arrive(place + 1, w))
            elif work.is_decode:
                self.token_times[work.session].append(self.now)
                following = decode_row(work.session, work.base_row + 1)
                self.at(self.hop_seconds, lambda w=following: self.arrive(0, w))
            else:
                self.at(self.hop_seconds, lambda w=work: self.came_through(w))
        self.at(0.0, lambda: self.turn(place))

    def came_through(self, work: Work) -> None:
        self.prompt_through = work.base_row + len(work.ids)
        if not self.prompt_left and self.prompt_through == self.prompt_issued:
            self.prompt_done_at = self.now
        self.issue()

    def gaps(self, since: float, until: float) -> list[float]:
        """Between tokens of each session."""
        found = []
        for times in self.token_times.values():
            kept = [t for t in times if since <= t <= until]
            found += [later - earlier for earlier, later in itertools.pairwise(kept)]
        return sorted(found)


def decode_row(session: int, row: int) -> Work:
    return Work(1, SessionId(session), 0, row + 1, row, (0,), None, 0, False)


def p99(values: list[float]) -> float:
    return values[int(0.99 * (len(values) - 1))]


# fixed and per-row seconds: a 1 B model on a slow core, the demo model, a GPU
SLOW, SMALL, GPU = (0.055, 0.025), (0.4e-3, 0.09e-3), (8e-3, 0.05e-3)


@pytest.mark.parametrize("decoding", [1, 4, 12])
@pytest.mark.parametrize(
    ("speeds", "hop_seconds"),
    [
        ([SLOW], 0.0),
        ([SMALL], 0.2e-3),
        ([GPU], 0.2e-3),
        ([SLOW, SLOW], 0.5e-3),
        ([SMALL, SMALL], 0.5e-3),
        ([SMALL, SMALL, SMALL], 0.5e-3),
        ([GPU, SLOW], 10e-3),
        ([SLOW, GPU], 1e-3),
    ],
)
def test_a_long_prompt_at_most_doubles_the_latency_of_others(
    speeds: list[tuple[float, float]], hop_seconds: float, decoding: int
) -> None:
    simulation = Simulation([SimulatedStage(*speed) for speed in speeds], hop_seconds, decoding)
    cycle = sum(fixed + decoding * row for fixed, row in speeds) + hop_seconds * len(speeds)
    settled, end = 50 * cycle, 250 * cycle
    simulation.run_until(end)
    alone = simulation.gaps(settled, end)
    prompt_rows = 2048
    simulation.add_prompt(prompt_rows)
    undisturbed = max(fixed * prompt_rows / CHUNK + row * prompt_rows for fixed, row in speeds)
    limit = end + 40 * undisturbed
    while simulation.prompt_done_at is None and simulation.now < limit:
        simulation.run_until(simulation.now + 10 * cycle)
    assert simulation.prompt_done_at is not None, "the prompt starves"
    beside = simulation.gaps(end, simulation.prompt_done_at)
    assert p99(beside) <= 2 * p99(alone), (p99(beside), p99(alone))
    assert simulation.prompt_done_at - end < 8 * undisturbed


class MeasuredStage(SimulatedStage):
    """Steps of 1, 2, 4 and 8 rows as measured: the second row is nearly free, the fourth is not."""

    def seconds(self, rows: int) -> float:
        knots = ((1, 27e-3), (2, 27e-3), (4, 42e-3), (8, 70e-3), (64, 460e-3))
        (low, before), (high, after) = next((a, b) for a, b in itertools.pairwise(knots) if rows <= b[0])
        return before + (after - before) * max(0, rows - low) / (high - low)


@pytest.mark.parametrize(("stages", "least_ratio"), [(1, 2.4), (2, 3.7), (3, 3.7)])
def test_four_sessions_keep_all_stages_at_work(stages: int, least_ratio: float) -> None:
    """Tokens a second of four, in those of one session on as many stages: 2.6 if they go round as one group."""
    speeds: list[float] = []
    for sessions in (1, 4):
        made: list[SimulatedStage] = [MeasuredStage(0.0, 0.0) for _ in range(stages)]
        simulation = Simulation(made, 0.6e-3, sessions)
        simulation.run_until(20.0)
        speeds.append(sum(sum(at > 15.0 for at in times) for times in simulation.token_times.values()) / 5.0)
        tokens = [len(times) for times in simulation.token_times.values()]
        assert min(tokens) > 0.9 * max(tokens)
    assert speeds[1] / speeds[0] >= least_ratio, speeds


class UnevenStage(MeasuredStage):
    """The same on a busy machine: every step takes a while longer, one in seven much longer."""

    def __init__(self, luck: random.Random) -> None:
        super().__init__(0.0, 0.0)
        self.luck = luck

    def seconds(self, rows: int) -> float:
        held_up = 0.8 * self.luck.random() if self.luck.random() < 0.15 else 0.0
        return super().seconds(rows) * (0.85 + 0.4 * self.luck.random() + held_up)


@pytest.mark.parametrize(
    ("stages", "sessions", "least_ratio"), [(1, 4, 2.4), (2, 2, 1.8), (2, 4, 3.3), (3, 4, 3.2)]
)
def test_stages_stay_at_work_where_steps_are_uneven(stages: int, sessions: int, least_ratio: float) -> None:
    """Where every stage waited for company, two stages soon disagreed on the groups: 3.0 with 4 sessions on 2."""
    ratios = []
    for seed in range(9):
        tokens = []
        for count in (1, sessions):
            luck = random.Random(seed)
            simulation = Simulation([UnevenStage(luck) for _ in range(stages)], 0.6e-3, count)
            simulation.run_until(4.0)
            tokens.append(sum(map(len, simulation.token_times.values())))
        ratios.append(tokens[1] / tokens[0])
    assert statistics.median(ratios) >= least_ratio, ratios


def test_without_anybody_decoding_chunks_are_whole() -> None:
    pace = StepPace()
    assert pace.pause_seconds(0, 100.0) == 0
    assert pace.prompt_rows(0, 100.0) is None


@pytest.mark.parametrize("decode_rows", [1, 2, 4])
def test_a_slow_step_does_not_keep_prompts_at_one_row_a_step_for_ever(decode_rows: int) -> None:
    """Seconds as on a machine whose kernels take three rows in more time than four."""
    seconds = {1: 0.0228, 2: 0.0245, 3: 0.039, 4: 0.0366, 5: 0.0437, 6: 0.048, 7: 0.06}
    pace, now = StepPace(), 0.0
    rows, ratios = [], []
    for step in range(2000):
        now += 0.1
        prompt_rows = pace.prompt_rows(decode_rows, now)
        assert prompt_rows is not None
        total = decode_rows + prompt_rows
        taken = seconds.get(total, 0.0085 * total)
        pace.ended(decode_rows, prompt_rows, 3 * taken if 100 <= step < 110 else taken, now)
        rows.append(prompt_rows)
        ratios.append(taken / seconds[decode_rows])
    assert statistics.mean(rows[1000:]) > 1.8
    assert sum(ratio > 2 for ratio in ratios[20:]) < 0.01 * len(ratios)


def test_the_time_of_a_row_is_that_of_steps_with_one_row_and_nothing_else() -> None:
    pace = StepPace()
    assert pace.served.row_seconds == 0
    for seconds in (0.02, 0.04):
        pace.ended(1, 0, seconds, 1.0)
    pace.ended(1, 64, 5.0, 2.0)
    pace.ended(4, 0, 5.0, 3.0)
    assert pace.served.row_seconds == pytest.approx(0.03)
    for _ in range(200):
        pace.ended(1, 0, 0.1, 4.0)
    assert pace.served.row_seconds == pytest.approx(0.1, rel=1e-3)


def test_a_round_is_from_row_to_row_of_a_session_that_is_alone() -> None:
    served = ServedTimes()
    one, other = SessionId(1), SessionId(2)
    for now in (1.0, 1.05, 1.11):
        served.ended(1, 0, 0.02, now, [one])
    assert served.round_seconds == pytest.approx(0.055)
    served.ended(1, 0, 0.02, 1.13, [other])  # somebody else's row came between
    served.ended(1, 0, 0.02, 1.17, [one])
    served.ended(2, 0, 0.02, 1.20, [one, other])
    served.ended(1, 0, 0.02, 1.24, [one])
    served.ended(1, 32, 0.02, 1.30, [one])  # a prompt rode beside it
    served.ended(1, 0, 0.02, 1.34, [one])
    served.ended(1, 0, 0.02, 8.0, [one])  # it stood still
    assert served.round_seconds == pytest.approx(0.055)
    assert served.row_seconds == pytest.approx(0.02)


def test_after_the_last_decode_row_chunks_are_whole_again() -> None:
    pace = StepPace()
    pace.came(SessionId(1))
    pace.began(1, 0.0)
    pace.ended(1, 0, 0.01, 0.01)
    assert pace.pause_seconds(0, 0.011) > 0
    assert pace.prompt_rows(0, 0.02) is not None
    pace.left(SessionId(1))
    assert pace.pause_seconds(0, 0.02) == 0
    assert pace.prompt_rows(0, 0.02) is None


def test_a_session_that_decoded_and_stands_still_is_not_waited_for_for_ever() -> None:
    pace = StepPace()
    pace.came(SessionId(1))
    pace.began(1, 0.0)
    pace.ended(1, 0, 0.01, 0.01)
    assert pace.prompt_rows(0, 60.0) is None
