"""The torch executor: on the CPU it is the reference in torch; on Triton's programs it is what a GPU runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Rows, Stage, StageFormats
from edge_runtime.engine.probe import probe
from edge_runtime.engine.reference import ReferenceStage
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic, choose
from edge_runtime.engine.torch_stage.blocks import TorchBlock
from edge_runtime.engine.torch_stage.stage import TorchStage
from edge_runtime.errors import CapacityError, EngineError
from tests.support.stages import Pipeline, logits_alone, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle
from tests.support.triton_device import DEVICE, products_in_order

MODELS = {
    "dense": TinyModel(),
    "window-softcap": TinyModel(window=5, softcap=20.0, qk_norm=False),
    "int8": TinyModel(format="int8"),
    "int4": TinyModel(format="int4"),
    "experts": TinyModel(experts=8),
    "experts-int8": TinyModel(experts=8, format="int8", softmax_after=True),
    "experts-int4": TinyModel(experts=8, format="int4"),
}
KV_BYTES = 8 << 20


def on_cpu(bundle: Bundle, layers: LayerRange) -> TorchStage:
    return TorchStage.load(
        bundle,
        layers,
        kv_budget_bytes=KV_BYTES,
        arithmetic=choose(bundle.manifest.model.weights, device="cpu"),
    )


def on_triton(type_name: str) -> Callable[[Bundle, LayerRange], TorchStage]:
    arithmetic = Arithmetic(torch.device(DEVICE), "triton", type_name)
    return lambda bundle, layers: TorchStage.load(
        bundle, layers, kv_budget_bytes=KV_BYTES, arithmetic=arithmetic
    )


def slow(value: object) -> Any:
    """Interpreting whole stages takes seconds."""
    return pytest.param(value, marks=pytest.mark.export)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: build_tiny_bundle(root / name, model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(kind="encoder", qk_norm=False)
    return build_tiny_bundle(tmp_path_factory.mktemp("encoder"), model)


@pytest.fixture
def stage(bundles: dict[str, Bundle]) -> Iterator[TorchStage]:
    stage = on_cpu(bundles["dense"], LayerRange(0, 2))
    yield stage
    stage.close()


def logits_in_two_pieces(bundle: Bundle, make: Callable[[Bundle, LayerRange], Stage], count: int) -> Rows:
    ids = np.random.default_rng(1).integers(0, 200, count).tolist()
    pipeline = Pipeline.load(bundle, make)
    pipeline.open(1, count)
    first = count * 4 // 5
    return np.concatenate([pipeline.run(span(1, 0, ids[:first])), pipeline.run(span(1, first, ids[first:]))])


def errors_of(fast: Rows, reference: Rows) -> Rows:
    return np.asarray(np.abs(fast - reference).max(axis=1) / np.abs(reference).max())


@pytest.mark.parametrize("name", MODELS)
def test_the_cpu_path_agrees_with_the_reference(bundles: dict[str, Bundle], name: str) -> None:
    fast, reference = (logits_in_two_pieces(bundles[name], make, 40) for make in (on_cpu, ReferenceStage))
    assert errors_of(fast, reference).max() < 1e-4


@pytest.mark.parametrize("name", [name if name == "experts-int4" else slow(name) for name in MODELS])
def test_triton_agrees_with_the_reference(bundles: dict[str, Bundle], name: str) -> None:
    fast, reference = (
        logits_in_two_pieces(bundles[name], make, 5) for make in (on_triton("fp32"), ReferenceStage)
    )
    assert errors_of(fast, reference).max() < 1e-4


@pytest.mark.export
@pytest.mark.parametrize("name", ["int4", "experts-int8"])
def test_triton_in_bfloat16_is_close_to_the_reference(bundles: dict[str, Bundle], name: str) -> None:
    fast, reference = (
        logits_in_two_pieces(bundles[name], make, 5) for make in (on_triton("bf16"), ReferenceStage)
    )
    # The median: a router between two nearly equal experts may choose the other one.
    assert np.median(errors_of(fast, reference)) < 0.05


@pytest.mark.export
def test_triton_rows_do_not_depend_on_batch_chunks_or_cuts(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    products_in_order(monkeypatch)
    make = on_triton("bf16")
    sessions = {1: [*range(5)], 2: [*range(50, 53)]}
    whole = Pipeline.load(bundles["experts-int4"], make)
    expected = {s: logits_alone(whole, s, ids) for s, ids in sessions.items()}
    pipeline = Pipeline.load(bundles["experts-int4"], make, 1)
    for s, ids in sessions.items():
        pipeline.open(s, len(ids))
    first = pipeline.run(span(1, 0, sessions[1][:3]), span(2, 0, sessions[2][:1]))
    then = pipeline.run(span(2, 1, sessions[2][1:]), span(1, 3, sessions[1][3:], 1))
    assert np.array_equal(first, np.concatenate([expected[1][:3], expected[2][:1]]))
    assert np.array_equal(then, np.concatenate([expected[2][1:], expected[1][4:]]))


@pytest.fixture(scope="module")
def pipelines(bundles: dict[str, Bundle]) -> dict[tuple[str, tuple[int, ...]], Pipeline]:
    return {
        (name, cuts): Pipeline.load(bundles[name], on_cpu, *cuts)
        for name in ("window-softcap", "experts-int8")
        for cuts in ((), (1,), (1, 2))
    }


@pytest.mark.parametrize("name", ["window-softcap", "experts-int8"])
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_cpu_rows_do_not_depend_on_batch_chunks_or_cuts(
    pipelines: dict[tuple[str, tuple[int, ...]], Pipeline], name: str, data: st.DataObject
) -> None:
    """Random sessions, cut into random chunks, in random company, on 1 to 3 stages: the bits of one row at a time."""
    lengths = data.draw(st.lists(st.integers(1, 36), min_size=1, max_size=3))
    sessions = {s: np.random.default_rng(s).integers(0, 200, n).tolist() for s, n in enumerate(lengths)}
    for pipeline in pipelines.values():
        for s in range(3):
            pipeline.drop(s)  # left open where an example ended early
    expected = {s: logits_alone(pipelines[name, ()], s, ids) for s, ids in sessions.items()}
    pipeline = pipelines[name, data.draw(st.sampled_from([(), (1,), (1, 2)]))]
    for s, ids in sessions.items():
        pipeline.open(s, len(ids))
    fed = dict.fromkeys(sessions, 0)
    while left := [s for s in sessions if fed[s] < len(sessions[s])]:
        spans = []
        for s in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            count = min(data.draw(st.integers(1, 24)), len(sessions[s]) - fed[s])
            spans.append(span(s, fed[s], sessions[s][fed[s] : fed[s] + count]))
        logits = pipeline.run(*spans)
        first = 0
        for one in spans:
            end = one.base_row + len(one.ids)
            rows = logits[first : first + one.logit_rows]
            first += one.logit_rows
            assert np.array_equal(rows, expected[one.session][one.base_row : end])
            fed[int(one.session)] = end


def test_a_new_parent_replaces_the_rows_after_it(bundles: dict[str, Bundle]) -> None:
    pipeline = Pipeline.load(bundles["experts"], on_cpu, 1)
    wanted = logits_alone(pipeline, 1, [*range(40), *range(100, 110)])
    pipeline.open(2, 60)
    pipeline.run(span(2, 0, range(60)))
    assert np.array_equal(pipeline.run(span(2, 40, range(100, 110))), wanted[40:])
    pipeline.drop(2, from_row=35)
    assert np.array_equal(pipeline.run(span(2, 35, [35, 36])), wanted[35:37])


@pytest.mark.parametrize("make", [on_cpu, slow(on_triton("bf16"))], ids=["cpu", "triton"])
def test_pages_are_shared_by_name_and_copied_on_write(
    bundles: dict[str, Bundle], make: Callable[[Bundle, LayerRange], TorchStage]
) -> None:
    stage = make(bundles["dense"], LayerRange(0, 0))
    ids = [*range(33)]
    assert list(stage.open(SessionId(1), 40, [b"first"])) == []
    stage.run(Batch((span(1, 0, ids, 0),), None))
    assert list(stage.open(SessionId(2), 40, [b"first"])) == ids[:32]
    changed = stage.run(Batch((span(2, 20, [7]),), None))  # writes into the page they share
    again = stage.run(Batch((span(1, 32, ids[32:]),), None))
    stage.drop(SessionId(1))
    stage.drop(SessionId(2))
    stage.give_back(all_pages=True)
    stage.open(SessionId(3), 40)
    whole = stage.run(Batch((span(3, 0, ids),), None))
    assert np.allclose(again[0], whole[32], atol=1e-5)
    assert not np.allclose(changed[0], whole[20], atol=1e-3)
    assert stage.kv_used_tokens == 64


def test_prefill_chunks_skip_the_head(stage: TorchStage) -> None:
    stage.open(SessionId(1), 10)
    assert stage.run(Batch((span(1, 0, range(5), 0),), None)).shape == (0, 200)
    assert stage.run(Batch((span(1, 5, range(5), 1),), None)).shape == (1, 200)


def test_inner_stages_take_and_give_hidden_rows(bundles: dict[str, Bundle]) -> None:
    inner = on_cpu(bundles["dense"], LayerRange(1, 1))
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


def test_a_bad_span_is_refused_and_harms_nobody(stage: TorchStage) -> None:
    for session in (1, 2):
        stage.open(SessionId(session), 10)
        stage.run(Batch((span(session, 0, range(5)),), None))
    with pytest.raises(CapacityError, match="reserved 10 rows and would hold 11"):
        stage.run(Batch((span(2, 5, (7,)), span(1, 5, range(6))), None))
    assert (stage.rows(SessionId(1)), stage.rows(SessionId(2))) == (5, 5)
    again = stage.run(Batch((span(2, 5, (7,)),), None))
    stage.open(SessionId(3), 10)
    assert np.array_equal(again[0], stage.run(Batch((span(3, 0, [*range(5), 7]),), None))[5])


def test_a_batch_that_fails_half_way_leaves_sessions_as_they_were(
    stage: TorchStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.open(SessionId(1), 10)
    stage.run(Batch((span(1, 0, range(5)),), None))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "ropes", {})
        with pytest.raises(EngineError, match="could not run a batch"):
            stage.run(Batch((span(1, 5, (7,)),), None))
    assert stage.rows(SessionId(1)) == 5
    stage.run(Batch((span(1, 5, (7,)),), None))


def test_sessions_too_long_for_the_model_or_the_memory_are_refused(bundles: dict[str, Bundle]) -> None:
    layers = LayerRange(0, 2)
    page = 3 * 2 * 32 * 2 * 16 * 4
    stage = TorchStage.load(
        bundles["dense"], layers, kv_budget_bytes=4 * page, arithmetic=choose("fp32", device="cpu")
    )
    assert stage.kv_capacity_tokens == 128
    with pytest.raises(CapacityError, match="wants 513 tokens; tiny was made for at most 512"):
        stage.open(SessionId(1), 513)
    stage.open(SessionId(1), 90)
    with pytest.raises(CapacityError, match="40 tokens; 32 of 128 are left"):
        stage.open(SessionId(2), 40)
    with pytest.raises(CapacityError, match=f"{page} bytes of KV memory; 100 are left"):
        TorchStage.load(
            bundles["dense"], layers, kv_budget_bytes=100, arithmetic=choose("fp32", device="cpu")
        )


def test_loading_another_range_keeps_the_blocks_both_have(bundles: dict[str, Bundle]) -> None:
    arithmetic = choose("fp32", device="cpu")
    first = on_cpu(bundles["dense"], LayerRange(0, 1))
    kept = first.blocks["layers.1"]
    second = TorchStage.load(
        bundles["dense"], LayerRange(1, 2), kv_budget_bytes=1 << 20, arithmetic=arithmetic, reuse=first
    )
    assert second.blocks["layers.1"] is kept
    assert list(second.blocks) == ["layers.1", "layers.2", "head"]
    with pytest.raises(EngineError, match="closed"):
        first.open(SessionId(1), 1)
    pipeline = Pipeline([on_cpu(bundles["dense"], LayerRange(0, 0)), second])
    whole = Pipeline.load(bundles["dense"], on_cpu)
    assert np.array_equal(logits_alone(pipeline, 1, range(8)), logits_alone(whole, 1, range(8)))


def test_a_tied_embedding_and_head_are_one_matrix(bundles: dict[str, Bundle]) -> None:
    stage = on_cpu(bundles["int8"], LayerRange(0, 2))
    assert sum(name == "embedding.weight" for name in stage._matrices) == 1
    assert {"embedding", "head"} <= {n for n, b in stage.blocks.items() if "embedding.weight" in b.matrices}


def test_layers_the_model_does_not_have_are_refused(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(EngineError, match="not all in this model, which has 3"):
        on_cpu(bundles["dense"], LayerRange(1, 3))


def test_a_manifest_that_contradicts_itself_is_refused(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["dense"]
    block = bundle.manifest.layers[0]
    attention = next(o for o in block.operations if o.kind == "attention")
    strange = replace(attention, attributes=attention.attributes | {"heads": "many"})
    operations = tuple(strange if o is attention else o for o in block.operations)
    with pytest.raises(EngineError, match=r"block layers\.0 can't be loaded"):
        TorchBlock(bundle, replace(block, operations=operations), choose("fp32", device="cpu"), {})


@pytest.mark.parametrize("name", ["dense", "experts-int8", "experts-int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_session_with_broken_numbers_harms_nobody(
    bundles: dict[str, Bundle], name: str, value: float
) -> None:
    stage = on_cpu(bundles[name], LayerRange(1, 2))
    for session in (1, 2):
        stage.open(SessionId(session), 10)
    good = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    broken = np.full((3, 64), value, np.float32)
    alone = stage.run(Batch((span(1, 0, range(4)),), good))
    batch = Batch((span(2, 0, range(3)), span(1, 0, range(4))), np.concatenate([broken, good]))
    assert np.array_equal(stage.run(batch)[3:], alone)


@pytest.mark.parametrize("make", [on_cpu, slow(on_triton("fp32"))], ids=["cpu", "triton"])
def test_an_encoder_pools_each_sequence_on_its_own(
    encoder: Bundle, make: Callable[[Bundle, LayerRange], TorchStage]
) -> None:
    pipeline, reference = Pipeline.load(encoder, make, 1), Pipeline.load(encoder, ReferenceStage)
    sequences = {1: range(7), 2: range(50, 84), 3: [5]}
    for session, ids in sequences.items():
        pipeline.open(session, len(ids))
        reference.open(session, len(ids))
    spans = [span(session, 0, ids) for session, ids in sequences.items()]
    together = pipeline.run(*spans)
    assert together.shape == (3, 64)
    assert np.allclose(together, reference.run(*spans), atol=1e-5)
    if make is on_cpu:
        for row, one in zip(together, spans, strict=True):
            assert np.array_equal(pipeline.run(one)[0], row)


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_rows_are_rounded_at_every_boundary_cut_or_not(bundles: dict[str, Bundle], wire: str) -> None:
    formats = StageFormats(wire=wire)

    def make(bundle: Bundle, layers: LayerRange) -> TorchStage:
        arithmetic = choose("int8", device="cpu")
        return TorchStage.load(
            bundle, layers, kv_budget_bytes=KV_BYTES, arithmetic=arithmetic, formats=formats
        )

    whole, cut = (Pipeline.load(bundles["int8"], make, *cuts) for cuts in ((), (1, 2)))
    expected = logits_alone(whole, 1, range(9))
    assert np.array_equal(logits_alone(cut, 1, range(9)), expected)
    assert not np.array_equal(logits_alone(Pipeline.load(bundles["int8"], on_cpu), 1, range(9)), expected)
    assert f"/wire:{wire}/" in whole.stages[0].numeric_class


def test_kv_in_other_formats_is_refused(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(EngineError, match="does not keep keys and values as int8"):
        TorchStage.load(
            bundles["int8"], LayerRange(0, 0), kv_budget_bytes=KV_BYTES, formats=StageFormats(kv="int8")
        )


def test_the_cpu_path_is_row_invariant_and_timed(bundles: dict[str, Bundle]) -> None:
    result = probe(on_cpu(bundles["experts-int4"], LayerRange(0, 2)), budget_seconds=0.5)
    assert result.row_invariant, result.why_not
    assert result.layer_decode_seconds > 0
    assert result.head_seconds > 0
    assert result.numeric_class.startswith("torch-")


def test_rows_that_depend_on_their_number_are_found(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TorchBlock.run

    def dependent(self: TorchBlock, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        result = run(self, hidden, *rest)
        return result * 1.000001 if len(hidden) == 2 else result

    monkeypatch.setattr(TorchBlock, "run", dependent)
    result = probe(on_cpu(bundles["int8"], LayerRange(1, 1)), budget_seconds=0.2)
    assert not result.row_invariant
    assert "2 rows" in result.why_not


def test_warming_up_leaves_nothing_behind(bundles: dict[str, Bundle]) -> None:
    """On a GPU it compiles every program before the first request, and before anything is timed."""
    stage = on_triton("bf16")(bundles["experts-int4"], LayerRange(1, 2))
    stage.warm_up()
    assert stage.kv_used_tokens == 0
    on_cpu(bundles["dense"], LayerRange(0, 0)).warm_up()


def test_the_class_names_everything_that_decides_bits() -> None:
    name = choose("int8", device="cpu").numeric_class("int8")
    assert name.startswith(f"torch-{torch.__version__}/")
    assert "/reference/w:int8/act:fp32/kv:fp32/wire:fp32/k:" in name
    triton = Arithmetic(torch.device("cpu"), "triton", "bf16").numeric_class("int4")
    assert "/triton-" in triton
    assert "/w:int4/act:bf16/kv:bf16/" in triton


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(EngineError, match="no CUDA device here"):
        choose("int8", device="cuda")
    with pytest.raises(EngineError, match="bf16 or fp32"):
        choose("int8", type_name="fp8")
