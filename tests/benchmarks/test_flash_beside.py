"""Flash is measured with what is like the product's reads: the right experts, as often, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.flash_beside import PROMPT, STRETCH_TOKENS, FlashBeside, missed_experts, spread, stand_ins
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.experts.replay import replay
from edge_runtime.experts.trace import read_trace
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

TRACE = read_trace(Path(__file__).parents[2] / "benchmarks" / "traces" / "qwen3_30b_a3b.csv.gz")


@pytest.mark.parametrize("policy", ["lfru", "lru"])
def test_what_is_missed_is_what_a_replay_counts(policy: str) -> None:
    missed = missed_experts(TRACE, TRACE.keys // 4, policy)
    replayed = replay(TRACE, TRACE.keys // 4, policy)
    assert sum(len(experts) for token, experts in missed.items() if token != PROMPT) == replayed.misses
    first = {layer: replayed.missed_by_access[layer] for layer in range(TRACE.layers)}
    assert [sum(at == layer for at, _ in missed[0]) for layer in range(TRACE.layers)] == list(first.values())


def test_stand_ins_are_of_the_same_layer_and_never_asked_for() -> None:
    found = stand_ins(TRACE)
    asked = {(access.layer, expert) for access in TRACE.accesses for expert in access.experts}
    assert set(found) <= asked
    assert not set(found.values()) & asked
    assert all(own[0] == other[0] for own, other in found.items())
    assert len(set(found.values())) == len(found)
    assert len(found) > len(asked) / 2


def test_a_figure_for_each_stretch(tmp_path: Path) -> None:
    model = TinyModel(layers=2, experts=TRACE.experts, top_k=TRACE.top_k, format="int4")
    bundle: Bundle = build_tiny_bundle(tmp_path / "bundle", model)
    beside = FlashBeside(expert_layers(bundle, bundle.manifest.layers), TRACE, TRACE.experts // 2, "lfru")
    seconds = [beside.follow(token) for token in range(PROMPT, 2 * STRETCH_TOKENS)]
    beside.close()
    assert len(beside.bytes_per_second) == 2
    assert min(beside.bytes_per_second) > 0.0
    assert min(seconds) >= 0.0


def test_a_layers_misses_are_read_together_and_layers_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel(layers=2, experts=TRACE.experts, top_k=TRACE.top_k, format="int4")
    bundle = build_tiny_bundle(tmp_path / "bundle", model)
    beside = FlashBeside(expert_layers(bundle, bundle.manifest.layers), TRACE, TRACE.experts // 2, "lfru")
    together: list[list[int]] = []

    def read_together(own: list[tuple[int, int]]) -> float:
        together.append([layer for layer, _ in own])
        return 1e-3

    monkeypatch.setattr(beside, "_read_together", read_together)
    for token in range(PROMPT, STRETCH_TOKENS):
        beside.follow(token)
    beside.close()
    assert together
    assert all(len(set(layers)) == 1 and len(layers) <= TRACE.top_k for layers in together)
    assert any(len(layers) > 1 for layers in together)


def test_the_spread_is_median_and_quartiles() -> None:
    assert spread([1e9, 2e9, 3e9]) == "2.00 (1.00 to 3.00)"
    assert spread([2e9]) == "2.00 (2.00 to 2.00)"
