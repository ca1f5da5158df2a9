"""The virtual world at small scale: the same ids under every fault, and rates near the formula's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import speculative
from benchmarks.simulator import identity
from benchmarks.simulator.baselines import Costs, best, synchronous
from benchmarks.simulator.model import plain_loop
from benchmarks.simulator.rates import limit, measure
from benchmarks.simulator.world import Setting, World
from edge_runtime.speculative.controller import Limits

CASES = dict(identity.cases(50))


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_plain_loop_whatever_is_drafted_and_lost(name: str) -> None:
    compared = identity.compare(name.partition(",")[0], CASES[name])
    assert (compared.tokens, compared.differing) == (50, 0)


def test_a_comparison_sees_a_changed_seed() -> None:
    setting = next(setting for name, setting in CASES.items() if ", sampled, none" in name)
    world = World(setting).run()
    other = replace(setting.sampling, seed=setting.sampling.seed + 1)
    assert world.ids == plain_loop(setting.prompt, setting.max_rows, setting.sampling)
    assert world.ids != plain_loop(setting.prompt, setting.max_rows, other)


def test_without_drafts_a_token_takes_a_turn_of_the_ring() -> None:
    for topology, seconds in (("ring", 0.1402), ("site", 0.0402)):
        world = World(Setting(new_tokens=40, topology=topology, draft_seconds=None)).run()
        assert world.tokens_per_second == pytest.approx(1 / seconds, rel=0.01)


@pytest.mark.parametrize("topology", ["ring", "site"])
def test_drafting_commits_what_the_formula_says_and_more_than_other_schemes(topology: str) -> None:
    rate = measure(topology, 0.85, 0.1, 300)
    assert rate.ours >= 0.9 * rate.limit
    assert rate.ours >= 4 * rate.loop
    assert rate.ours > max(rate.plain, rate.synchronous, rate.pearl)
    assert rate.late_fraction <= 0.02


def test_side_rows_save_misses_and_nothing_is_fed_again() -> None:
    """Ids that side rows give are known before their rows have come through: no stage may be left without them."""
    rates = []
    for width in (1, 2):
        setting = Setting(new_tokens=300, acceptance=0.74, rescue=1.0, limits=Limits(max_width=width))
        world = World(setting).run()
        assert world.ids == plain_loop(setting.prompt, setting.max_rows, setting.sampling)
        assert world.sessions == 1
        assert world.device is not None
        assert (world.device.loop.counts.rescued > 0) == (width > 1)
        rates.append(world.tokens_per_second)
    assert rates[1] > 1.05 * rates[0]


def test_the_limit_and_drafting_in_turns_are_those_of_the_published_table() -> None:
    """Acceptance 0.85, R = 100 ms, laptop: 38.9 streamed, 30.8 in turns (research note, section 5)."""
    assert limit(0.85, 0.1402) == pytest.approx(38.9, rel=0.01)
    costs = Costs(0.85, 0.1, 0.004, lambda rows: 0.04 + 0.0002 * rows)
    assert best(synchronous, costs)[0] == pytest.approx(30.8, rel=0.05)


def test_figures_of_parts_are_joined_and_missing_ones_are_null() -> None:
    identical = {"identical_tokens": 10, "differing_tokens": 0}
    joined = speculative.join({"identity": dict(identical), "real": {**identical, "real_speedup_code": 2.5}})
    assert joined["identical_tokens"] == 20
    assert joined["real_speedup_code"] == 2.5
    assert joined["coupling_efficiency_t1"] is None
