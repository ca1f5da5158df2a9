"""Drafts through real layers, samplers and protocol code in a virtual world: the ids of one model alone.

`python -m benchmarks.speculative --only layers` is the same over more than 20 000 ids.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulator import cpu_identity
from benchmarks.simulator.cpu_identity import Case, CpuWorld, compare, drafter_of, plain_ids
from benchmarks.simulator.cpu_stage import CpuWorldStage
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import SessionId
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

TOKENS = 40
CASES = {case.name: case for case in cpu_identity.cases(TOKENS, 512)}
SOME = [
    next(name for name, case in CASES.items() if (case.drafter, case.faults) == pair)
    for pair in [
        ("right", "all at once"),
        ("mixed", "lost"),
        ("mixed", "replanned"),
        ("wrong", "repeated and overtaken"),
        ("suffix", "reconnected"),
        ("model", "all at once"),
        ("auto", "repeated and overtaken"),
    ]
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("layers") / "bundle", TinyModel())


@pytest.mark.parametrize("name", SOME)
def test_ids_are_those_of_one_model_alone_whatever_is_drafted_and_lost(bundle: Bundle, name: str) -> None:
    case = CASES[name]
    if (
        case.faults == "replanned"
    ):  # sooner than in the benchmark: so few ids are made in less than its first second
        faults = replace(case.setting.faults, replan_seconds=0.3)
        case = replace(case, setting=replace(case.setting, faults=faults))
    compared = compare(case, bundle, plain_ids(bundle, case.setting))
    assert (compared.tokens, compared.differing) == (TOKENS, 0)
    if case.drafter in ("mixed", "right"):
        assert compared.accepted > 0
    if case.faults == "replanned":
        assert compared.leases > 0


def mixed() -> Case:
    case = CASES[SOME[1]]
    return replace(case, setting=replace(case.setting, stages=2))


def test_rows_that_are_dead_become_nan_and_a_row_that_is_read_may_not_be(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: poison one row more, which is alive, and the sampler refuses what comes out."""
    case = mixed()
    wanted = plain_ids(bundle, case.setting)
    assert compare(case, bundle, wanted).poisoned > 0
    poison = CpuWorldStage._poison

    def poison_more(stage: CpuWorldStage, session: SessionId, first: int) -> None:
        poison(stage, session, first - 1)

    monkeypatch.setattr(CpuWorldStage, "_poison", poison_more)
    with pytest.raises(AssertionError, match="a step failed"):
        compare(case, bundle, wanted)


def test_another_seed_gives_other_ids(bundle: Bundle) -> None:
    case = next(case for case in CASES.values() if case.sampling == "sampled")
    other = replace(
        case.setting, sampling=replace(case.setting.sampling, seed=case.setting.sampling.seed + 1)
    )
    wanted = plain_ids(bundle, case.setting)
    world = CpuWorld(other, drafter_of(case, bundle, wanted), bundle).run()
    assert world.ids != wanted
    assert world.ids == plain_ids(bundle, other)
    for stage in world.stages.values():
        stage.close()
