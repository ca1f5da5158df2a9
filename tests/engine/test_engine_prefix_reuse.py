"""Rows taken over from another session are the rows the session would have computed, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.errors import EngineError
from tests.support.stages import Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

VOCAB = 200
MODELS = {
    "dense": TinyModel(),
    "window": TinyModel(window=40, softcap=20.0),
    "experts": TinyModel(experts=8, format="int8"),
}


@pytest.fixture(scope="module", params=["native", "onnx"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: build_tiny_bundle(root / name, model) for name, model in MODELS.items()}


def load(bundle: Bundle, executor: str, *boundaries: int, kv_budget_bytes: int = 1 << 20) -> Pipeline:
    def make(bundle: Bundle, layers: LayerRange) -> CpuStage:
        return CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=kv_budget_bytes, executor=executor)

    return Pipeline.load(bundle, make, *boundaries)


def names_of(ids: Sequence[int]) -> list[bytes]:
    return [repr(ids[:end]).encode() for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)]


def run_reusing(pipeline: Pipeline, session: int, ids: list[int], chunk: int) -> tuple[np.ndarray, int]:
    """(logits of the rows that were run, how many were not)"""
    held = [
        len(stage.open(SessionId(session), len(ids) + 1, names_of(ids[:-1]))) for stage in pipeline.stages
    ]
    start = min(held)
    rows = [
        pipeline.run(span(session, base, ids[base : base + chunk])) for base in range(start, len(ids), chunk)
    ]
    return np.concatenate(rows), start


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2)], ids=["1 stage", "2 stages", "3 stages"])
def test_logits_after_reuse_are_those_of_a_session_alone(
    bundles: dict[str, Bundle], executor: str, name: str, boundaries: tuple[int, ...]
) -> None:
    pipeline = load(bundles[name], executor, *boundaries)
    rng = np.random.default_rng(3)
    ids = [int(n) for n in rng.integers(0, VOCAB, 110)]
    other = ids[:70] + [int(n) for n in rng.integers(0, VOCAB, 30)]
    expected = {tuple(x): logits_alone(pipeline, 100 + n, x) for n, x in enumerate((ids, other))}
    for session, wanted, reused in ((1, ids, 0), (2, other, 64), (3, ids, 96)):
        logits, start = run_reusing(pipeline, session, wanted, chunk=13)
        assert start == reused
        assert np.array_equal(logits, expected[tuple(wanted)][start:])
    for session in (2, 1):
        pipeline.drop(session)
    logits, start = run_reusing(pipeline, 4, ids, chunk=64)
    assert start == 96
    assert np.array_equal(logits, expected[tuple(ids)][96:])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mix_of_sessions_that_begin_alike(bundles: dict[str, Bundle], data: st.DataObject) -> None:
    """Sessions come and go over a cache that is too small for all their pages; each gets the bits it gets alone."""
    pipeline = load(bundles["dense"], "native", 1, kv_budget_bytes=12 * 2 * 2 * 2 * 32 * 16 * 4)
    beginnings = [[n] * 32 + [7] * 32 + [n] * 32 for n in range(3)]
    open_sessions: dict[int, tuple[list[int], int]] = {}
    for session in range(1, data.draw(st.integers(2, 9))):
        ids = beginnings[data.draw(st.integers(0, 2))][: data.draw(st.integers(1, 96))]
        ids = ids + data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
        while sum(-(-len(x) // 32) for x, _ in open_sessions.values()) + -(-(len(ids) + 1) // 32) > 12:
            pipeline.drop(open_sessions.popitem()[0])
        logits, start = run_reusing(pipeline, session, ids, data.draw(st.sampled_from([1, 16, 50])))
        open_sessions[session] = (ids, start)
        assert np.array_equal(logits, expected_logits(bundles["dense"], tuple(ids))[start:])
        if data.draw(st.booleans()):
            pipeline.drop(open_sessions.popitem()[0])


_KNOWN: dict[tuple[int, ...], np.ndarray] = {}
_ALONE: list[Pipeline] = []


def expected_logits(bundle: Bundle, ids: tuple[int, ...]) -> np.ndarray:
    if not _ALONE:
        _ALONE.append(load(bundle, "native"))
    if ids not in _KNOWN:
        _ALONE[0].open(1, len(ids))
        _KNOWN[ids] = _ALONE[0].run(span(1, 0, ids))
        _ALONE[0].drop(1)
    return _KNOWN[ids]


def test_pages_of_an_answer_are_kept_under_the_names_given_at_the_end(
    bundles: dict[str, Bundle], executor: str
) -> None:
    pipeline = load(bundles["dense"], executor)
    stage = pipeline.stages[0]
    ids = [n % VOCAB for n in range(130)]
    stage.open(SessionId(1), 200, names_of(ids[:40]))
    pipeline.run(span(1, 0, ids[:40]))
    for row in range(40, 130):
        pipeline.run(span(1, row, [ids[row]]))
    wrong = [*ids[32:96], *ids[64:96][::-1]]
    stage.keep(SessionId(1), 1, names_of(ids)[1:4], wrong)  # the third page is said to hold other ids
    pipeline.drop(1)
    assert list(stage.open(SessionId(2), 200, names_of(ids))) == ids[:96]


def test_a_batch_that_fails_leaves_no_name_behind(
    bundles: dict[str, Bundle], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(bundles["dense"], executor)
    stage = pipeline.stages[0]
    assert isinstance(stage, CpuStage)
    ids = [n % VOCAB for n in range(80)]
    stage.open(SessionId(1), 100, names_of(ids[:-1]))
    pipeline.run(span(1, 0, ids[:40]))

    def fail(*_: object) -> None:
        raise RuntimeError("the last block fails, when keys and values are written already")

    with monkeypatch.context() as patch:
        patch.setattr(list(stage.blocks.values())[-1], "run", fail)
        with pytest.raises(EngineError):
            pipeline.run(span(1, 40, ids[40:]))
    assert list(stage.open(SessionId(2), 100, names_of(ids[:-1]))) == ids[:32]
    pipeline.run(span(1, 40, ids[40:]))
    assert list(stage.open(SessionId(3), 100, names_of(ids[:-1]))) == ids[:64]


def test_kept_pages_are_given_back_and_never_count_against_a_new_session(
    bundles: dict[str, Bundle], executor: str
) -> None:
    pipeline = load(bundles["dense"], executor)
    stage = pipeline.stages[0]
    assert isinstance(stage, CpuStage)
    ids = [n % VOCAB for n in range(64)]
    while stage.kv_committed_bytes < stage.kv_capacity_tokens // PAGE_TOKENS * stage.kv_shape.page_bytes:
        ids[0] = (ids[0] + 1) % VOCAB  # another prefix every time, until no page is free
        ids[1] += ids[0] == 0
        pipeline.open(1, 65)
        stage.drop(SessionId(1))
        stage.open(SessionId(1), 65, names_of(ids))
        stage.run(Batch((Span(SessionId(1), 0, tuple(ids)),), None))
        pipeline.drop(1)
    assert stage.kv_used_tokens == 0
    stage.open(SessionId(2), min(stage.kv_capacity_tokens, MODELS["dense"].max_context))
    stage.drop(SessionId(2))
    stage.give_back()
    stage.give_back()
    assert stage.kv_committed_bytes == 0
