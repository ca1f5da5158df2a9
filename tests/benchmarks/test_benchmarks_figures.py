"""What benchmarks compute from times, on literal cases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.arrivals import BURSTINESS, arrivals, capacity, most_overtaken, offered, starved
from benchmarks.plans import PlanResult, first_plan_errors, plan_errors
from benchmarks.samples import Sample, Samples, in_turns, percentile, quiet_sample
from benchmarks.steps import Step, read_steps, ring_hops, row_hops
from benchmarks.streams import Prompts, Stream, total_tokens_per_second
from benchmarks.timed_agent import RECORD


async def test_arms_take_turns_in_an_order_that_turns_round() -> None:
    order: list[str] = []

    def arm(name: str):
        async def once() -> float:
            order.append(name)
            return float(len(order))

        return once

    found = await in_turns({"a": arm("a"), "b": arm("b")}, 2, tries=1)
    assert order == ["a", "b", "b", "a"]
    assert (found.values("a"), found.values("b")) == ([1.0, 4.0], [2.0, 3.0])


async def test_a_disturbed_sample_is_taken_again_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = iter([0.9, 0.3, 0.5, 1.0, 0.0])
    monkeypatch.setattr("benchmarks.samples.OtherWork.cores", lambda self: next(others))
    values = iter(range(10))

    async def measure() -> float:
        return float(next(values))

    assert (await quiet_sample("a", measure, tries=3)).value == 1.0
    assert (await quiet_sample("a", measure, tries=3)).value == 4.0


def samples(**values: list[float]) -> Samples:
    return Samples({name: [Sample(value, 0.0, 1.0, 0.0) for value in each] for name, each in values.items()})


def test_a_ratio_is_the_median_of_neighbours() -> None:
    assert samples(a=[1.0, 4.0, 9.0], b=[1.0, 2.0, 3.0]).ratio("a", "b") == 2.0
    assert samples(a=[1.0, 4.0, 9.0], b=[1.0, 2.0, 3.0]).compared("a", "b", lambda a, b: a - b) == 2.0
    assert samples(a=[1.0]).ratio("a", "b") is None


def test_rounds_that_others_disturbed_count_only_where_there_are_no_others() -> None:
    def sample(value: float, other_cores: float) -> Sample:
        return Sample(value, 0.0, 1.0, other_cores)

    found = Samples({"a": [sample(9.0, 0.0), sample(2.0, 0.0)], "b": [sample(1.0, 0.8), sample(1.0, 0.05)]})
    assert (found.ratio("a", "b"), found.median("b"), found.median("a")) == (2.0, 1.0, 5.5)


def test_percentiles_are_observed_values() -> None:
    assert percentile(list(range(100)), 0.99) == 99
    assert percentile([3.0], 0.5) == 3.0


def step(begin: float, end: float, row: int, *, session: int = 1, rows: int = 1) -> Step:
    return Step(begin, end, session, row, rows, 0)


def test_hops_lie_between_the_compute_of_two_stages() -> None:
    first = [step(0.0, 1.0, 5), step(2.5, 3.0, 6), step(9.0, 9.5, 0, rows=4)]
    tail = [step(1.25, 2.0, 5), step(3.5, 4.0, 6)]
    assert sorted(row_hops([first, tail])) == [0.25, 0.5]
    assert ring_hops([first, tail]) == [0.5]


def test_notes_are_read_up_to_a_record_that_was_cut_off(tmp_path) -> None:
    path = tmp_path / "steps"
    path.write_bytes(RECORD.pack(1.0, 2.0, 3, 4, 5, 6) + b"half")
    assert read_steps(path) == [Step(1.0, 2.0, 3, 4, 5, 6)]


def stream_of(started: float, *times: float) -> Stream:
    return Stream(1, started, list(times))


def test_speed_together_counts_only_the_time_when_all_decode() -> None:
    streams = [stream_of(0, 1, 2, 3, 4), stream_of(0, 2, 3, 4, 5)]
    assert total_tokens_per_second(streams) == 2.0


def test_a_session_starves_only_while_others_get_tokens() -> None:
    quick = stream_of(0, *np.arange(1.0, 40.0))
    waits = stream_of(0, 30.0)
    assert starved([quick, waits], seconds=15, tokens=10) == 1
    assert starved([quick, waits], seconds=15, tokens=32) == 0
    assert starved([waits, stream_of(0, 30.0)], seconds=15, tokens=10) == 0  # nothing moved for anybody


def test_arrivals_are_as_bursty_and_as_many_as_asked() -> None:
    wanted = arrivals(1, 4000, 2.0, 64, 32)
    assert wanted == arrivals(1, 4000, 2.0, 64, 32)
    gaps = np.array([b.at_seconds - a.at_seconds for a, b in pairwise(wanted)])
    assert gaps.mean() == pytest.approx(0.5, rel=0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(BURSTINESS, rel=0.15)
    assert np.median([each.prompt_tokens for each in wanted]) == pytest.approx(64, rel=0.1)


def test_what_is_offered_is_the_stated_work_in_the_same_bursts() -> None:
    wanted = arrivals(1, 60, 1.0, 64, 32)
    slower = offered(wanted, 40.0)
    assert sum(each.rows for each in slower) / slower[-1].at_seconds == pytest.approx(40.0)
    assert slower[0].at_seconds == 0
    before, after = (np.diff([each.at_seconds for each in requests]) for requests in (wanted, slower))
    assert np.allclose(after / after.sum(), before / before.sum())


def test_capacity_counts_while_as_many_run_as_are_meant_to() -> None:
    streams = [
        Stream(10, 0.0, [1.0, 2.0], 2.0),  # its end opens the window
        Stream(10, 0.0, [1.0, 3.0, 5.0], 5.0),
        Stream(30, 2.0, [4.0, 8.0], 8.0),
        Stream(50, 6.0, [7.0, 9.0], 9.0),  # its start closes it
    ]
    found = capacity(streams)
    assert (found.new_tokens_per_second, found.prompt_tokens_per_second) == (3 / 4, 30 / 4)
    assert found.rows_per_second == 33 / 4
    with pytest.raises(ValueError, match="more requests"):
        capacity(streams[:2])


def test_who_has_begun_and_who_waits_for_the_first_token_are_told_apart() -> None:
    quick, waits = stream_of(0, *np.arange(1.0, 40.0)), stream_of(0, 30.0)
    assert starved([quick, waits], seconds=15, tokens=10, once_begun=True) == 0
    assert starved([quick, stream_of(0, 1.0, 30.0)], seconds=15, tokens=10, once_begun=True) == 1


def test_overtaking_is_counted_by_first_tokens() -> None:
    assert most_overtaken([stream_of(0, 9.0), stream_of(1, 3.0), stream_of(2, 8.0), stream_of(3, 10.0)]) == 2
    assert most_overtaken([stream_of(0, 1.0), stream_of(1, 2.0)]) == 0


def test_prompts_are_never_the_same_twice() -> None:
    prompts = Prompts(32_000)
    assert prompts.new(32) != prompts.new(32)
    assert min(prompts.new(1000)) >= 3


def test_a_plan_is_held_against_what_was_predicted_just_before() -> None:
    plan = PlanResult("a machine that slows down", 40.0, ((20.0, 20.0), (20.0, 10.0), (11.0, 10.0)))
    assert plan.error == pytest.approx(0.1)
    assert (plan.predicted, plan.measured) == (20.0, 10.0)
    assert first_plan_errors([plan]) == pytest.approx([3.0])


def test_plan_errors_have_no_sign() -> None:
    assert plan_errors(
        [PlanResult("slow", 5.0, ((8.0, 10.0),)), PlanResult("fast", 5.0, ((11.0, 10.0),))]
    ) == pytest.approx([0.2, 0.1])
