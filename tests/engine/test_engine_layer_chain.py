"""Consecutive layers in one call: the bits of the blocks one by one, and only where nothing else takes part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine import layer_chain
from edge_runtime.engine.base import Batch, Rows, StageFormats
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.layer_chain import MOST_ROWS, LayerChain, chained
from tests.support.stages import span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

MODELS = {
    "dense": TinyModel(),
    "window-softcap": TinyModel(window=5, softcap=20.0, qk_norm=False),
    "int4": TinyModel(format="int4"),
    "int8": TinyModel(format="int8"),
}


def load(bundle: Bundle, *, threads: int = 1, formats: StageFormats | None = None) -> CpuStage:
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    return CpuStage.load(
        bundle,
        layers,
        threads=threads,
        kv_budget_bytes=4 << 20,
        executor="native",
        formats=formats or StageFormats(),
    )


def batches() -> list[Batch]:
    """A prompt, then decode rows beside a chunk of another, then both decode."""
    return [
        Batch((span(1, 0, range(7), 1),), None),
        Batch((span(1, 7, [3], 1), span(2, 0, range(9), 0)), None),
        Batch((span(1, 8, [4], 1), span(2, 9, [5, 6], 2)), None),
    ]


def run(stage: CpuStage) -> list[Rows]:
    for session in (1, 2):
        stage.open(SessionId(session), 64)
    return [stage.run(batch) for batch in batches()]


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_few_rows_in_one_call_have_the_bits_of_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kv: str
) -> None:
    bundle = build_tiny_bundle(tmp_path / name, MODELS[name])
    together = [run(load(bundle, threads=threads, formats=StageFormats(kv=kv))) for threads in (1, 2)]
    monkeypatch.setattr(layer_chain, "MOST_ROWS", 0)
    apart = run(load(bundle, formats=StageFormats(kv=kv)))
    for found in together:
        assert all(np.array_equal(a, b) for a, b in zip(found, apart, strict=True))


def test_all_layers_of_a_dense_model_are_one_call(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "dense", MODELS["dense"])
    stage = load(bundle)
    size = bundle.manifest.model.hidden_size
    runners = chained(stage.blocks, "native", stage.ropes, size)
    last = bundle.manifest.num_layers - 1
    assert [runner.name for runner in runners] == ["embedding", f"layers.{last}", "head"]
    assert isinstance(runners[1], LayerChain)
    assert runners[1].attention_count == bundle.manifest.num_layers
    assert chained(stage.blocks, "onnx", stage.ropes, size) == list(stage.blocks.values())


def test_layers_with_experts_stay_apart(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "experts", TinyModel(experts=8))
    stage = load(bundle)
    runners = chained(stage.blocks, "native", stage.ropes, bundle.manifest.model.hidden_size)
    assert runners == list(stage.blocks.values())


def test_many_rows_run_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run_chain = LayerChain.run

    def counted(self: LayerChain, hidden: Rows, *rest: object) -> Rows:
        calls.append(len(hidden))
        return run_chain(self, hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerChain, "run", counted)
    stage = load(build_tiny_bundle(tmp_path / "dense", MODELS["dense"]))
    stage.open(SessionId(1), 2 * MOST_ROWS + 2)
    stage.run(Batch((span(1, 0, [7] * (MOST_ROWS + 1), 1),), None))
    stage.run(Batch((span(1, MOST_ROWS + 1, [7] * MOST_ROWS, 1),), None))
    assert calls == [MOST_ROWS]
