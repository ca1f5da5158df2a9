"""What every executor's stage must do: one class of tests, run for each of them.

A test module subclasses `StageContract` and has two fixtures, `load` and `load_block`. Knows: the interface `Stage` and
small bundles. Does not know: which executor runs, and how close to the reference it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine import layer_chain
from edge_runtime.engine.base import Batch, Rows
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.errors import CapacityError, EngineError
from tests.support.stages import MakeStage, Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel

MODELS = {
    "dense": TinyModel(),
    "window-softcap": TinyModel(window=5, softcap=20.0, qk_norm=False),
    "int8": TinyModel(format="int8"),
    "int4": TinyModel(format="int4"),
    "experts": TinyModel(experts=8),
    "experts-int8": TinyModel(experts=8, format="int8", softmax_after=True),
    "experts-int4": TinyModel(experts=8, format="int4"),
    "experts-nested4": TinyModel(experts=8, format="nested4"),
    "experts-nested8": TinyModel(experts=8, format="nested8"),
}
KV_BYTES = 8 << 20
PAGE_BYTES = 3 * 2 * 32 * 2 * 16 * 4  # of the three layers of these models

# (bundle, layers, kv_budget_bytes=KV_BYTES, reuse=None) -> a stage
Load = Callable[..., Any]
LoadBlock = Callable[[Bundle, Block], object]
Pipelines = Mapping[tuple[str, tuple[int, ...]], Pipeline]

BAD_SPANS = {
    "an unknown session": (span(9, 0, (1,)), EngineError, "session 9 is not open"),
    "a gap": (span(1, 6, (1,)), EngineError, "from 6 on, but holds 5"),
    "a negative row": (span(1, -1, (1,)), EngineError, "from -1 on"),
    "too many rows": (span(1, 5, range(6)), CapacityError, "reserved 10 rows and would hold 11"),
    "no rows": (span(1, 5, ()), EngineError, "without rows"),
    "too many logits": (span(1, 5, (1,), 2), EngineError, "logits of 2 rows of a span of 1"),
    "an id of another vocabulary": (span(1, 5, (200,)), EngineError, r"outside 0\.\.199"),
    "a negative id": (span(1, 5, (-1,)), EngineError, r"outside 0\.\.199"),
}


def pipelines_of(load: Load, bundles: Mapping[str, Bundle], names: Sequence[str]) -> Pipelines:
    """Each model cut in every way."""
    return {
        (name, cuts): Pipeline.load(bundles[name], load, *cuts)
        for name in names
        for cuts in ((), (1,), (2,), (1, 2))
    }


def check_random_batches(
    pipelines: Pipelines, name: str, data: st.DataObject, *, most_sessions: int = 4, most_rows: int = 45
) -> None:
    """Random sessions, cut into random chunks, in random company, on 1 to 3 stages: the bits of one row at a time."""
    lengths = data.draw(st.lists(st.integers(1, most_rows), min_size=1, max_size=most_sessions))
    sessions = {s: np.random.default_rng(s).integers(0, 200, n).tolist() for s, n in enumerate(lengths)}
    for pipeline in pipelines.values():
        for s in range(4):
            pipeline.drop(s)  # left open where an example ended early
    expected = {s: logits_alone(pipelines[name, ()], s, ids) for s, ids in sessions.items()}
    pipeline = pipelines[name, data.draw(st.sampled_from([(), (1,), (2,), (1, 2)]))]
    for s, ids in sessions.items():
        pipeline.open(s, len(ids))
    fed = dict.fromkeys(sessions, 0)
    while left := [s for s in sessions if fed[s] < len(sessions[s])]:
        spans = []
        for s in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            count = min(data.draw(st.integers(1, 24)), len(sessions[s]) - fed[s])
            wanted = data.draw(st.integers(0, count))
            spans.append(span(s, fed[s], sessions[s][fed[s] : fed[s] + count], wanted))
        logits = pipeline.run(*spans)
        first = 0
        for one in spans:
            end = one.base_row + len(one.ids)
            rows = logits[first : first + one.logit_rows]
            first += one.logit_rows
            assert np.array_equal(rows, expected[one.session][end - one.logit_rows : end])
            fed[int(one.session)] = end
    for s in range(4):
        pipeline.drop(s)
    assert all(one.kv_used_tokens == 0 for one in pipeline.stages)


def pool_together_and_alone(make: MakeStage, encoder: Bundle) -> tuple[Pipeline, Rows, Rows]:
    """(the pipeline, three sequences pooled in one batch, each pooled alone), compared with the reference."""
    pipeline, reference = Pipeline.load(encoder, make, 1), Pipeline.load(encoder, ReferenceStage)
    sequences = {1: range(7), 2: range(50, 84), 3: [5]}
    for session, ids in sequences.items():
        pipeline.open(session, len(ids))
        reference.open(session, len(ids))
    spans = [span(session, 0, ids) for session, ids in sequences.items()]
    together = pipeline.run(*spans)
    assert together.shape == (3, 64)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together, reference.run(*spans), atol=1e-5)
    return pipeline, together, np.concatenate([pipeline.run(one) for one in spans])


class StageContract:
    """Subclasses have the fixtures `load` (Load) and `load_block` (LoadBlock)."""

    @staticmethod
    def blocks_of(stage: Any) -> Mapping[str, object]:
        blocks: Mapping[str, object] = stage.blocks
        return blocks

    @pytest.fixture
    def stage(self, load: Load, bundles: Mapping[str, Bundle]) -> Iterator[Any]:
        stage = load(bundles["dense"], LayerRange(0, 2))
        yield stage
        stage.close()

    def test_a_new_parent_replaces_the_rows_after_it(self, load: Load, bundles: Mapping[str, Bundle]) -> None:
        pipeline = Pipeline.load(bundles["experts"], load, 1)
        wanted = logits_alone(pipeline, 1, [*range(40), *range(100, 110)])
        pipeline.open(2, 60)
        pipeline.run(span(2, 0, range(60)))
        assert np.array_equal(pipeline.run(span(2, 40, range(100, 110))), wanted[40:])
        pipeline.drop(2, from_row=35)
        assert np.array_equal(pipeline.run(span(2, 35, [35, 36])), wanted[35:37])

    def test_prefill_chunks_skip_the_head(self, stage: Any) -> None:
        stage.open(SessionId(1), 10)
        assert stage.run(Batch((span(1, 0, range(5), 0),), None)).shape == (0, 200)
        assert stage.run(Batch((span(1, 5, range(5), 1),), None)).shape == (1, 200)

    def test_inner_stages_take_and_give_hidden_rows(self, load: Load, bundles: Mapping[str, Bundle]) -> None:
        inner = load(bundles["dense"], LayerRange(1, 1))
        inner.open(SessionId(1), 10)
        hidden = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
        result = inner.run(Batch((span(1, 0, (1, 2, 3)),), hidden))
        assert result.shape == (3, 64)
        unaligned = np.frombuffer(b"." + hidden.tobytes(), np.float32, offset=1)  # and read-only, as received
        assert np.array_equal(inner.run(Batch((span(1, 0, (1, 2, 3)),), unaligned.reshape(3, 64))), result)
        with pytest.raises(EngineError, match=r"float32 \(1, 64\) was announced"):
            inner.run(Batch((span(1, 3, (4,)),), hidden))
        with pytest.raises(EngineError, match="takes hidden rows"):
            inner.run(Batch((span(1, 3, (4,)),), None))

    @pytest.mark.parametrize("what", BAD_SPANS)
    def test_a_bad_span_is_refused_and_harms_nobody(self, stage: Any, what: str) -> None:
        bad, error, message = BAD_SPANS[what]
        for session in (1, 2):
            stage.open(SessionId(session), 10)
            stage.run(Batch((span(session, 0, range(5)),), None))
        with pytest.raises(error, match=message):
            stage.run(Batch((span(2, 5, (7,)), bad), None))
        assert (stage.rows(SessionId(1)), stage.rows(SessionId(2))) == (5, 5)
        again = stage.run(Batch((span(2, 5, (7,)),), None))
        stage.open(SessionId(3), 10)
        assert np.array_equal(again[0], stage.run(Batch((span(3, 0, [*range(5), 7]),), None))[5])

    def test_a_batch_that_fails_half_way_leaves_sessions_as_they_were(
        self, stage: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.open(SessionId(1), 10)
        stage.run(Batch((span(1, 0, range(5)),), None))
        with monkeypatch.context() as patch:
            patch.setattr(stage, "ropes", {})
            patch.setattr(layer_chain, "MOST_ROWS", 0)  # a chain has its tables already
            with pytest.raises(EngineError, match="could not run a batch"):
                stage.run(Batch((span(1, 5, (7,)),), None))
        assert stage.rows(SessionId(1)) == 5
        stage.run(Batch((span(1, 5, (7,)),), None))

    def test_sessions_too_long_for_the_model_or_the_memory_are_refused(
        self, load: Load, bundles: Mapping[str, Bundle]
    ) -> None:
        stage = load(bundles["dense"], LayerRange(0, 2), kv_budget_bytes=4 * PAGE_BYTES)
        assert stage.kv_capacity_tokens == 128
        with pytest.raises(CapacityError, match="wants 513 tokens; tiny was made for at most 512"):
            stage.open(SessionId(1), 513)
        stage.open(SessionId(1), 90)
        with pytest.raises(CapacityError, match="40 tokens; 32 of 128 are left"):
            stage.open(SessionId(2), 40)
        stage.drop(SessionId(1))
        stage.open(SessionId(2), 40)
        with pytest.raises(CapacityError, match=f"{PAGE_BYTES} bytes of KV memory; 100 are left"):
            load(bundles["dense"], LayerRange(0, 2), kv_budget_bytes=100)

    def test_loading_another_range_keeps_the_blocks_both_have(
        self, load: Load, bundles: Mapping[str, Bundle]
    ) -> None:
        first = load(bundles["dense"], LayerRange(0, 1))
        kept = self.blocks_of(first)["layers.1"]
        second = load(bundles["dense"], LayerRange(1, 2), kv_budget_bytes=1 << 20, reuse=first)
        assert self.blocks_of(second)["layers.1"] is kept
        assert list(self.blocks_of(second)) == ["layers.1", "layers.2", "head"]
        with pytest.raises(EngineError, match="closed"):
            first.open(SessionId(1), 1)
        pipeline = Pipeline([load(bundles["dense"], LayerRange(0, 0)), second])
        whole = Pipeline.load(bundles["dense"], load)
        assert np.array_equal(logits_alone(pipeline, 1, range(8)), logits_alone(whole, 1, range(8)))

    def test_layers_the_model_does_not_have_are_refused(
        self, load: Load, bundles: Mapping[str, Bundle]
    ) -> None:
        with pytest.raises(EngineError, match="not all in this model, which has 3"):
            load(bundles["dense"], LayerRange(1, 3))

    @pytest.mark.parametrize("name", ["dense", "experts-int8", "experts-int4"])
    @pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
    def test_a_session_with_broken_numbers_harms_nobody(
        self, load: Load, bundles: Mapping[str, Bundle], name: str, value: float
    ) -> None:
        stage = load(bundles[name], LayerRange(1, 2))
        for session in (1, 2):
            stage.open(SessionId(session), 10)
        good = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
        broken = np.full((3, 64), value, np.float32)
        alone = stage.run(Batch((span(1, 0, range(4)),), good))
        batch = Batch((span(2, 0, range(3)), span(1, 0, range(4))), np.concatenate([broken, good]))
        assert np.array_equal(stage.run(batch)[3:], alone)

    def test_a_manifest_that_contradicts_itself_is_refused(
        self, load_block: LoadBlock, bundles: Mapping[str, Bundle]
    ) -> None:
        bundle = bundles["dense"]
        block = bundle.manifest.layers[0]
        attention = next(o for o in block.operations if o.kind == "attention")
        strange = replace(attention, attributes={**attention.attributes, "heads": "many"})
        operations = tuple(strange if o is attention else o for o in block.operations)
        with pytest.raises(EngineError, match=r"block layers\.0 can't be loaded"):
            load_block(bundle, replace(block, operations=operations))

    def test_an_encoder_pools_each_sequence_on_its_own(self, load: Load, encoder: Bundle) -> None:
        pipeline, together, alone = pool_together_and_alone(load, encoder)
        assert np.array_equal(together, alone)
        with pytest.raises(EngineError, match="whole sequence at once"):
            pipeline.run(span(1, 3, (1, 2)))
