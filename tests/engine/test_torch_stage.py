"""The torch executor: on the CPU it is the reference in torch; on Triton's programs it is what a GPU runs."""

from __future__ import annotations

from collections.abc import Callable
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
from edge_runtime.errors import EngineError
from tests.support import stage_contract
from tests.support.stage_contract import (
    KV_BYTES,
    Load,
    LoadBlock,
    Pipelines,
    StageContract,
    check_random_batches,
    pipelines_of,
    pool_together_and_alone,
)
from tests.support.stages import Pipeline, logits_alone, span, ticking
from tests.support.triton_device import DEVICE, products_in_order

MODELS = [name for name in stage_contract.MODELS if "nested" not in name]


def on_cpu(bundle: Bundle, layers: LayerRange, kv_budget_bytes: int = KV_BYTES, **more: Any) -> TorchStage:
    arithmetic = choose(bundle.manifest.model.weights, device="cpu")
    return TorchStage.load(bundle, layers, kv_budget_bytes=kv_budget_bytes, arithmetic=arithmetic, **more)


def on_triton(type_name: str) -> Callable[[Bundle, LayerRange], TorchStage]:
    arithmetic = Arithmetic(torch.device(DEVICE), "triton", type_name)
    return lambda bundle, layers: TorchStage.load(
        bundle, layers, kv_budget_bytes=KV_BYTES, arithmetic=arithmetic
    )


def slow(value: object) -> Any:
    """Interpreting whole stages takes seconds."""
    return pytest.param(value, marks=pytest.mark.export)


@pytest.fixture(scope="module")
def pipelines(bundles: dict[str, Bundle]) -> Pipelines:
    return pipelines_of(on_cpu, bundles, ("window-softcap", "experts-int8"))


class TestContract(StageContract):
    @pytest.fixture
    def load(self) -> Load:
        return on_cpu

    @pytest.fixture
    def load_block(self) -> LoadBlock:
        return lambda bundle, block: TorchBlock(bundle, block, choose("fp32", device="cpu"), {})


@pytest.mark.parametrize("name", ["window-softcap", "experts-int8"])
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_cpu_rows_do_not_depend_on_batch_chunks_or_cuts(
    pipelines: Pipelines, name: str, data: st.DataObject
) -> None:
    check_random_batches(pipelines, name, data, most_sessions=3, most_rows=36)


@pytest.mark.export
def test_an_encoder_pools_on_triton(encoder: Bundle) -> None:
    pool_together_and_alone(on_triton("fp32"), encoder)


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


def test_a_tied_embedding_and_head_are_one_matrix(bundles: dict[str, Bundle]) -> None:
    stage = on_cpu(bundles["int8"], LayerRange(0, 2))
    assert sum(name == "embedding.weight" for name in stage._matrices) == 1
    assert {"embedding", "head"} <= {n for n, b in stage.blocks.items() if "embedding.weight" in b.matrices}


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
    result = probe(on_cpu(bundles["experts-int4"], LayerRange(0, 2)), clock=ticking(1e-3))
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
    result = probe(on_cpu(bundles["int8"], LayerRange(1, 1)), clock=ticking(1e-3))
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


@pytest.mark.parametrize(("name", "instead"), [("experts-nested4", "int4"), ("experts-nested8", "int8")])
def test_bit_nested_experts_are_refused_with_a_way_out(
    bundles: dict[str, Bundle], name: str, instead: str
) -> None:
    with pytest.raises(EngineError, match=f"no kernels for experts_nested{instead[-1]}") as refused:
        on_cpu(bundles[name], LayerRange(0, 2))
    assert refused.value.hint.endswith(f"--weights {instead}")


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so nothing is missing")
    with pytest.raises(EngineError, match="no CUDA device here"):
        choose("int8", device="cuda")
    with pytest.raises(EngineError, match="bf16 or fp32"):
        choose("int8", type_name="fp8")
