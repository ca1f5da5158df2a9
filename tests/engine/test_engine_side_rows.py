"""Side rows: the bits of the same rows on a chain, no keys and values left, nothing read that was not written."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, StageFormats
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.engine.side_pages import pages_wanted
from edge_runtime.engine.side_rows import NO_SIDES, SideRows, parted
from edge_runtime.errors import CapacityError, EngineError
from tests.support.stages import Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle
from tests.support.trees import logits_of_sides, random_sides, with_sides

VOCAB = 200
MODELS = {"window-softcap": TinyModel(window=5, softcap=20.0, qk_norm=False), "experts": TinyModel(experts=8)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: build_tiny_bundle(root / name, model) for name, model in MODELS.items()}


def poisoned(bundle: Bundle, layers: LayerRange, kv: str = "fp32", kv_bytes: int = 4 << 20) -> CpuStage:
    """Whatever is read before it was written is NaN."""
    stage = CpuStage.load(
        bundle, layers, threads=1, kv_budget_bytes=kv_bytes, formats=StageFormats(kv=kv), executor="native"
    )
    poison(stage)
    return stage


def poison(stage: CpuStage) -> None:
    """Pages that nobody uses."""
    used = {page for s in stage._cache.table.sessions() for page in stage._cache.table.get(s).pages}
    free = [page for page in range(stage._cache.table.num_pages) if page not in used]
    pool = stage._cache.pool
    pool.view(np.float32 if pool.dtype == np.float32 else np.int8)[free] = (
        np.nan if pool.dtype == np.float32 else -1
    )


@pytest.fixture(scope="module")
def pipelines(bundles: dict[str, Bundle]) -> dict[tuple[str, str], Pipeline]:
    return {
        (name, kv): Pipeline.load(bundles[name], lambda b, layers, kv=kv: poisoned(b, layers, kv), 1)
        for name in MODELS
        for kv in ("fp32", "int8")
    }


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_side_rows_have_the_bits_of_the_same_rows_on_a_chain(
    pipelines: dict[tuple[str, str], Pipeline], name: str, kv: str, seed: int
) -> None:
    rng, pipeline = random.Random(seed), pipelines[name, kv]
    spans, expected = [], []
    for session in range(3):
        pipeline.drop(session)
    for session in range(rng.randint(1, 3)):
        before = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 70))]
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        sides = random_sides(rng, len(before), len(ids), 5, VOCAB) if session < 2 else NO_SIDES
        one = with_sides(span(session, len(before), ids, rng.randint(0, len(ids))), sides)
        pipeline.open(9, 100)
        expected += [
            pipeline.run(span(9, 0, [*before, *ids], one.logit_rows)),
            logits_of_sides(pipeline, 8, before, one),
        ]
        pipeline.drop(9)
        pipeline.open(session, len(before) + len(ids) + 4)
        pipeline.run(span(session, 0, before, 0))
        spans.append(one)
    used = [stage._cache.table.used_pages for stage in stages(pipeline)]
    for stage in stages(pipeline):
        poison(stage)
    result = pipeline.run(*spans)
    assert np.array_equal(
        result, np.concatenate([rows for rows in expected if len(rows)]) if len(result) else result
    )
    for stage, before_pages in zip(stages(pipeline), used, strict=True):
        chains = sum(
            -(-(s.base_row + len(s.ids)) // PAGE_TOKENS) - -(-s.base_row // PAGE_TOKENS) for s in spans
        )
        assert stage._cache.table.used_pages == before_pages + chains
        assert [stage.rows(s.session) for s in spans] == [s.base_row + len(s.ids) for s in spans]
    for one in spans:
        pipeline.drop(int(one.session))
    assert all(stage._cache.table.used_pages == 0 for stage in stages(pipeline))


def stages(pipeline: Pipeline) -> list[CpuStage]:
    return [stage for stage in pipeline.stages if isinstance(stage, CpuStage)]


def test_what_follows_is_that_of_a_session_without_side_rows(bundles: dict[str, Bundle]) -> None:
    """Step after step, each with other side rows over the end of a page, none leaves a trace."""
    rng = random.Random(3)
    ids = [rng.randrange(VOCAB) for _ in range(60)]
    pipeline = Pipeline.load(bundles["window-softcap"], poisoned)
    expected = logits_alone(pipeline, 9, ids)
    pipeline.open(1, 60)
    pipeline.run(span(1, 0, ids[:20], 0))
    at = 20
    while at < 60:
        count = min(rng.randint(1, 7), 60 - at)
        sides = random_sides(rng, at, count, 6, VOCAB)
        rows = pipeline.run(with_sides(span(1, at, ids[at : at + count]), sides))
        assert np.array_equal(rows[:count], expected[at : at + count])
        for stage in stages(pipeline):
            poison(stage)
        at += count


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_agrees(bundles: dict[str, Bundle], name: str) -> None:
    rng = random.Random(7)
    before, ids = [rng.randrange(VOCAB) for _ in range(37)], [1, 2, 3]
    one = with_sides(span(1, 37, ids), SideRows((4, 5, 6, 7), (36, ~0, 38, 39)))
    results = []
    for make in (poisoned, ReferenceStage):
        pipeline = Pipeline.load(bundles[name], make, 2)
        pipeline.open(1, 60)
        pipeline.run(span(1, 0, before, 0))
        results.append(pipeline.run(one))
    fast, reference = results
    assert len(fast) == 7
    assert np.abs(fast - reference).max() < 1e-5 * np.abs(reference).max()


def test_too_few_pages_are_refused_before_anything_ran(bundles: dict[str, Bundle]) -> None:
    stage = poisoned(bundles["experts"], LayerRange(0, 2))
    few = stage.kv_shape.page_bytes * 3
    stage = poisoned(bundles["experts"], LayerRange(0, 2), kv_bytes=few)
    stage.open(SessionId(1), 40)
    stage.run(Batch((span(1, 0, range(20), 0),), None))
    wide = with_sides(span(1, 20, [1]), SideRows((2, 3, 4), (19, 19, 19)))
    assert pages_wanted((wide,)) > stage.spare_pages == 2
    with pytest.raises(CapacityError, match="side rows"):
        stage.run(Batch((wide,), None))
    assert stage.rows(SessionId(1)) == 20
    narrow = with_sides(span(1, 20, [1]), SideRows((2, 3), (19, 19)))
    assert len(stage.run(Batch((narrow,), None))) == 3
    assert stage.spare_pages == 2


def test_side_rows_that_continue_no_row_of_their_span_are_refused(bundles: dict[str, Bundle]) -> None:
    stage = poisoned(bundles["experts"], LayerRange(0, 2))
    stage.open(SessionId(1), 40)
    stage.run(Batch((span(1, 0, range(20), 0),), None))
    for parent in (18, 21):
        with pytest.raises(EngineError, match="continues no row"):
            stage.run(Batch((with_sides(span(1, 20, [1]), SideRows((2,), (parent,))),), None))
    with pytest.raises(EngineError, match="outside"):
        stage.run(Batch((with_sides(span(1, 20, [1]), SideRows((VOCAB,), (19,))),), None))


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 6))
def test_numbered_trees_are_read_back(seed: int, base: int, count: int) -> None:
    rng = random.Random(seed)
    sides = random_sides(rng, base, count, 8, VOCAB)
    parents = (*range(base - 1, base + count - 1), *sides.numbered(base, count))
    ids = (*range(count), *sides.ids)
    if sides and sides.parents[0] == base + count - 1:
        return  # it continues the chain, and so belongs to it
    assert parted(base, parents, ids) == (ids[:count], sides)


@given(st.lists(st.integers(-3, 20), max_size=6), st.integers(0, 10))
def test_whatever_parents_arrive_they_are_a_tree_or_refused(parents: list[int], base: int) -> None:
    try:
        chain, sides = parted(base, parents, range(len(parents)))
    except ValueError:
        return
    assert len(chain) + len(sides) == len(parents)
    assert all(position > base - 1 for position in sides.positions())
    kept, index = sides.only([token % 2 == 0 for token in sides.ids])
    assert kept.ids == tuple(sides.ids[i] for i in index)
    assert [kept.positions()[n] for n in range(len(kept))] == [sides.positions()[i] for i in index]
