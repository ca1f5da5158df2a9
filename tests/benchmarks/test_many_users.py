"""Many users on two stages in virtual time: the real rules of stages, queues and paces, steps as measured.

Seconds of a step by its rows are those of two 1-thread stages of a 1 B model on a machine without AVX-512.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from benchmarks.arrivals import Arrival, arrivals, most_overtaken, offered, starved
from benchmarks.simulator.many_users import ManyUsers
from benchmarks.streams import Stream

FRONT = {1: 25.6, 2: 27.1, 3: 39.2, 4: 36.9, 5: 49.0, 6: 50.8, 7: 59.7, 8: 62.0}
BACK = {1: 25.4, 2: 26.2, 3: 37.4, 4: 35.4, 5: 45.7, 6: 49.5, 7: 56.0, 8: 52.0}


def step_seconds(listed: dict[int, float], row: float, luck: random.Random) -> Callable[[int], float]:
    def seconds(rows: int) -> float:
        held_up = 0.6 * luck.random() if luck.random() < 0.2 else 0.0
        return 1e-3 * listed.get(rows, row * rows) * (0.88 + 0.25 * luck.random() + held_up)

    return seconds


def served(wanted: list[Arrival], seed: int, at_once: int | None = None) -> tuple[list[Stream], ManyUsers]:
    stages = [
        step_seconds(FRONT, 8.0, random.Random(seed)),
        step_seconds(BACK, 6.6, random.Random(seed + 100)),
    ]
    users = ManyUsers(wanted, stages, at_once=at_once)
    return users.run(), users


def requests(count: int, seed: int = 20) -> list[Arrival]:
    return arrivals(seed, count, 1.0, 64, 32)


def test_both_stages_are_at_work_while_there_is_enough_to_do() -> None:
    """79 rows a second where a size of steps that was slow once was not tried again for long; 71 and fewer where
    prompts rode beside decode rows only."""
    speeds = []
    for seed in range(2):
        streams, users = served(requests(28, 21), seed, at_once=8)
        seconds = max(each.ended for each in streams)
        for stage in users.stages.values():
            assert sum(step.ended - step.began for step in stage.steps) > 0.83 * seconds
        speeds.append(sum(each.prompt_tokens + len(each.token_times) for each in streams) / seconds)
    assert sum(speeds) / len(speeds) > 85


@pytest.mark.parametrize("seed", range(2))
def test_at_seven_tenths_of_the_capacity_nobody_starves(seed: int) -> None:
    streams, _ = served(offered(requests(60), 0.7 * 90), seed)
    assert starved(streams, seconds=15, tokens=32) == 0
    assert max(each.ttft_seconds for each in streams) < 14


def test_above_the_capacity_who_waits_waits_in_order_and_who_has_begun_goes_on() -> None:
    streams, _ = served(offered(requests(60), 1.5 * 90), 0)
    assert most_overtaken(streams) <= 2
    assert starved(streams, seconds=3, tokens=8, once_begun=True) == 0


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    long, short = Arrival(0.0, 2048, 8), Arrival(0.5, 32, 8)
    (first, second), _ = served([long, short], 0)
    assert second.ttft_seconds < 5 < first.ttft_seconds


@pytest.mark.parametrize(("sessions", "least_tokens"), [(3, 2.2), (4, 2.85)])
def test_sessions_that_decode_together_settle_into_groups_soon(sessions: int, least_tokens: float) -> None:
    """Tokens in the time of two steps of one row. Three sessions: 1.9 to 2.1 where no two ever came together."""
    for seed in range(4):
        streams, _ = served([Arrival(0.0, 16, 64)] * sessions, seed, at_once=sessions)
        begin = max(each.token_times[0] for each in streams)
        end = min(each.token_times[-1] for each in streams)
        tokens = sum(begin < at <= end for each in streams for at in each.token_times)
        assert tokens / (end - begin) * 2e-3 * FRONT[1] > least_tokens
