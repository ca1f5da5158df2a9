"""The CPU stage on both executors: it agrees with the reference, and a row's bits depend on its own session alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import edge_kernels
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine import layer_chain
from edge_runtime.engine.base import Batch, Rows, Span
from edge_runtime.engine.blocks import LoadedBlock
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.errors import CapacityError, EngineError
from tests.support.stages import Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

MODELS = {
    "dense": TinyModel(),
    "window-softcap": TinyModel(window=5, softcap=20.0, qk_norm=False),
    "int8": TinyModel(format="int8"),
    "int4": TinyModel(format="int4"),
    "experts": TinyModel(experts=8),
    "experts-int8": TinyModel(experts=8, format="int8", softmax_after=True),
    "experts-int4": TinyModel(experts=8, format="int4"),
    "experts-nested4": TinyModel(experts=8, format="nested4"),
}
# Quantized weights meet int8 activations in this executor and fp32 ones in the reference.
TOLERANCE = {"fp32": 1e-5, "int8": 0.04, "int4": 0.04, "nested4": 0.04}


Load = Callable[[Bundle, LayerRange], CpuStage]


@pytest.fixture(scope="module", params=["native", "onnx"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def load(executor: str) -> Load:
    return lambda bundle, layers: CpuStage.load(
        bundle, layers, threads=1, kv_budget_bytes=8 << 20, executor=executor
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: build_tiny_bundle(root / name, model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(kind="encoder", qk_norm=False)
    return build_tiny_bundle(tmp_path_factory.mktemp("encoder"), model)


@pytest.fixture
def stage(load: Load, bundles: dict[str, Bundle]) -> Iterator[CpuStage]:
    stage = load(bundles["dense"], LayerRange(0, 2))
    yield stage
    stage.close()


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_reference(load: Load, bundles: dict[str, Bundle], name: str) -> None:
    ids = np.random.default_rng(1).integers(0, 200, 40).tolist()
    results = []
    for make in (load, ReferenceStage):
        pipeline = Pipeline.load(bundles[name], make)
        pipeline.open(1, 40)
        results.append(
            np.concatenate([pipeline.run(span(1, 0, ids[:33])), pipeline.run(span(1, 33, ids[33:]))])
        )
    fast, reference = results
    errors = np.abs(fast - reference).max(axis=1) / np.abs(reference).max()
    # Of quantized rows the median: a router between two equal experts may choose the other one.
    worst = errors.max() if MODELS[name].format == "fp32" else np.median(errors)
    assert worst < TOLERANCE[MODELS[name].format]


@pytest.fixture(scope="module")
def pipelines(load: Load, bundles: dict[str, Bundle]) -> dict[tuple[str, tuple[int, ...]], Pipeline]:
    names = ("window-softcap", "int4", "experts-int8")
    return {
        (name, cuts): Pipeline.load(bundles[name], load, *cuts)
        for name in names
        for cuts in ((), (1,), (2,), (1, 2))
    }


@pytest.mark.parametrize("name", ["window-softcap", "int4", "experts-int8"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_rows_do_not_depend_on_batch_chunks_or_cuts(
    pipelines: dict[tuple[str, tuple[int, ...]], Pipeline], executor: str, name: str, data: st.DataObject
) -> None:
    """Random sessions, cut into random chunks, in random company, on 1 to 3 stages: the bits of one row at a time."""
    if (executor, name) == ("onnx", "int4") and "avx512" not in edge_kernels.available_isas():
        # An agent's probe finds out, and such a stage gets a fixed grid of chunks; our own kernels are the default.
        pytest.skip("without AVX-512, ONNX Runtime's 4-bit products of few rows differ from those of one")
    lengths = data.draw(st.lists(st.integers(1, 45), min_size=1, max_size=4))
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


def test_a_new_parent_replaces_the_rows_after_it(load: Load, bundles: dict[str, Bundle]) -> None:
    pipeline = Pipeline.load(bundles["experts"], load, 1)
    wanted = logits_alone(pipeline, 1, [*range(40), *range(100, 110)])
    pipeline.open(2, 60)
    pipeline.run(span(2, 0, range(60)))
    assert np.array_equal(pipeline.run(span(2, 40, range(100, 110))), wanted[40:])
    pipeline.drop(2, from_row=35)
    assert np.array_equal(pipeline.run(span(2, 35, [35, 36])), wanted[35:37])


def test_prefill_chunks_skip_the_head(stage: CpuStage) -> None:
    stage.open(SessionId(1), 10)
    assert stage.run(Batch((span(1, 0, range(5), 0),), None)).shape == (0, 200)
    assert stage.run(Batch((span(1, 5, range(5), 1),), None)).shape == (1, 200)


def test_inner_stages_take_and_give_hidden_rows(load: Load, bundles: dict[str, Bundle]) -> None:
    inner = load(bundles["dense"], LayerRange(1, 1))
    inner.open(SessionId(1), 10)
    hidden = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    result = inner.run(Batch((span(1, 0, (1, 2, 3)),), hidden))
    assert result.shape == (3, 64)
    received = np.frombuffer(b"." + hidden.tobytes(), np.float32, offset=1).reshape(
        3, 64
    )  # read-only, unaligned
    assert np.array_equal(inner.run(Batch((span(1, 0, (1, 2, 3)),), received)), result)
    with pytest.raises(EngineError, match=r"float32 \(1, 64\) was announced"):
        inner.run(Batch((span(1, 3, (4,)),), hidden))
    with pytest.raises(EngineError, match="takes hidden rows"):
        inner.run(Batch((span(1, 3, (4,)),), None))


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


@pytest.mark.parametrize("what", BAD_SPANS)
def test_a_bad_span_is_refused_and_harms_nobody(stage: CpuStage, what: str) -> None:
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
    stage: CpuStage, monkeypatch: pytest.MonkeyPatch
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


def test_sessions_too_long_for_the_model_or_the_memory_are_refused(bundles: dict[str, Bundle]) -> None:
    layers = LayerRange(0, 2)
    page = 3 * 2 * 32 * 2 * 16 * 4
    stage = CpuStage.load(bundles["dense"], layers, threads=1, kv_budget_bytes=4 * page)
    assert stage.kv_capacity_tokens == 128
    with pytest.raises(CapacityError, match="wants 513 tokens; tiny was made for at most 512"):
        stage.open(SessionId(1), 513)
    stage.open(SessionId(1), 90)
    with pytest.raises(CapacityError, match="40 tokens; 32 of 128 are left"):
        stage.open(SessionId(2), 40)
    stage.drop(SessionId(1))
    stage.open(SessionId(2), 40)
    with pytest.raises(CapacityError, match=f"{page} bytes of KV memory; 100 are left"):
        CpuStage.load(bundles["dense"], layers, threads=1, kv_budget_bytes=100)


def test_loading_another_range_keeps_the_blocks_both_have(
    load: Load, executor: str, bundles: dict[str, Bundle]
) -> None:
    first = load(bundles["dense"], LayerRange(0, 1))
    kept = first._blocks["layers.1"]
    second = CpuStage.load(
        bundles["dense"],
        LayerRange(1, 2),
        threads=1,
        kv_budget_bytes=1 << 20,
        executor=executor,
        reuse=first,
    )
    assert second._blocks["layers.1"] is kept
    assert list(second._blocks) == ["layers.1", "layers.2", "head"]
    with pytest.raises(EngineError, match="closed"):
        first.open(SessionId(1), 1)
    pipeline = Pipeline([load(bundles["dense"], LayerRange(0, 0)), second])
    whole = Pipeline.load(bundles["dense"], load)
    assert np.array_equal(logits_alone(pipeline, 1, range(8)), logits_alone(whole, 1, range(8)))


def logits_with(bundle: Bundle, executor: str, threads: int) -> Rows:
    stage = CpuStage.load(
        bundle, LayerRange(0, 2), threads=threads, kv_budget_bytes=1 << 20, executor=executor
    )
    stage.open(SessionId(1), 40)
    return stage.run(Batch((span(1, 0, range(40)),), None))


@pytest.mark.parametrize("name", ["int4", "experts-int8", "dense"])
def test_the_number_of_threads_changes_no_bit(bundles: dict[str, Bundle], executor: str, name: str) -> None:
    one = logits_with(bundles[name], executor, 1)
    for threads in (2, 3):
        assert np.array_equal(one, logits_with(bundles[name], executor, threads))


def test_onnx_runtime_shares_one_pool_of_many_threads(bundles: dict[str, Bundle]) -> None:
    one = logits_with(bundles["int4"], "onnx", 1)
    # More threads come from one pool of the process, which then all sessions must use: a process of its own.
    script = f"""
import sys
from tests.engine.test_engine_cpu_stage import Bundle, logits_with
bundle = Bundle.open({str(bundles["int4"].path)!r})
sys.stdout.buffer.write(logits_with(bundle, "onnx", 5).tobytes() + logits_with(bundle, "onnx", 2).tobytes())
"""
    shared = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert shared.stdout == one.tobytes() * 2
    assert b"5 threads; 2 cannot be had" in shared.stderr


def test_layers_the_model_does_not_have_are_refused(load: Load, bundles: dict[str, Bundle]) -> None:
    with pytest.raises(EngineError, match="not all in this model, which has 3"):
        load(bundles["dense"], LayerRange(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("hidden", "more")}, "takes 1 values and gives 3; the manifest says 2 and 3"),
        ({"graph": "norm"}, "could not load layers.0 operations 0-3"),
    ],
)
def test_a_segment_that_does_not_fit_its_manifest_is_refused(
    bundles: dict[str, Bundle], change: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["dense"]
    block = bundle.manifest.layers[0]
    if "graph" in change:  # bytes that are no graph
        change = {"graph": bundle.manifest.tensors["layers.0.norm1"].parts["data"]}
    segment = replace(block.segments[0], **change)
    block = replace(block, segments=(segment, *block.segments[1:]))
    with pytest.raises(EngineError, match=message):
        LoadedBlock(bundle, block, "onnx", threads=1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["dense", "experts-int8", "experts-int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_session_with_broken_numbers_harms_nobody(
    load: Load, bundles: dict[str, Bundle], name: str, value: float
) -> None:
    stage = load(bundles[name], LayerRange(1, 2))
    for session in (1, 2):
        stage.open(SessionId(session), 10)
    good = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    broken = np.full((3, 64), value, np.float32)
    alone = stage.run(Batch((span(1, 0, range(4)),), good))
    batch = Batch((span(2, 0, range(3)), span(1, 0, range(4))), np.concatenate([broken, good]))
    assert np.array_equal(stage.run(batch)[3:], alone)


def test_a_manifest_that_contradicts_itself_is_refused(bundles: dict[str, Bundle], executor: str) -> None:
    bundle = bundles["dense"]
    block = bundle.manifest.layers[0]
    attention = next(o for o in block.operations if o.kind == "attention")
    strange = replace(attention, attributes=attention.attributes | {"heads": "many"})
    operations = tuple(strange if o is attention else o for o in block.operations)
    with pytest.raises(EngineError, match=r"block layers\.0 can't be loaded"):
        LoadedBlock(bundle, replace(block, operations=operations), executor, threads=1)


def test_an_encoder_pools_each_sequence_on_its_own(load: Load, encoder: Bundle) -> None:
    pipeline, reference = Pipeline.load(encoder, load, 1), Pipeline.load(encoder, ReferenceStage)
    sequences = {1: range(7), 2: range(50, 100), 3: [5]}
    for session, ids in sequences.items():
        pipeline.open(session, len(ids))
        reference.open(session, len(ids))
    spans = [span(session, 0, ids) for session, ids in sequences.items()]
    together = pipeline.run(*spans)
    assert together.shape == (3, 64)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together, reference.run(*spans), atol=1e-5)
    for row, one in zip(together, spans, strict=True):
        assert np.array_equal(pipeline.run(one)[0], row)
    with pytest.raises(EngineError, match="whole sequence at once"):
        pipeline.run(span(1, 3, (1, 2)))


def test_embedding_and_experts_stay_mapped(load: Load, tmp_path: Path) -> None:
    """Weights the segments repack leave resident memory; experts and embedding rows come in as they are used."""
    bundle = build_tiny_bundle(tmp_path / "bundle", TinyModel(layers=1, experts=4))
    stage = load(bundle, LayerRange(0, 0))
    stage.open(SessionId(1), 4)
    assert stage.weight_bytes == bundle.manifest.stage_weight_bytes(0, 0)
    first = stage.run(Batch((Span(SessionId(1), 0, (1, 2), 1),), None))
    bundle.close()  # views stay valid: the stage holds them
    stage.drop(SessionId(1))
    stage.open(SessionId(1), 4)
    assert np.array_equal(first, stage.run(Batch((Span(SessionId(1), 0, (1, 2), 1),), None)))
