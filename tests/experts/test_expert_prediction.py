"""Guesses of the next layer's experts: what the predictors count and compute, and how well they name what comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.engine.weights import read_tensor
from edge_runtime.experts.affinity import Affinity
from edge_runtime.experts.next_gate import NextGate, folded, next_gates
from edge_runtime.experts.predictor import best_of, likeliest, recalled, wanted
from edge_runtime.experts.recall import COMPARED_PLACES, COMPARES_EVERY_STEPS, Recall, looked_at
from edge_runtime.experts.statistics import CacheStatistics
from edge_runtime.experts.trace import decode_routing
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

RECORDED = Path(__file__).parent / "data" / "qwen3_30b_4_layers_60_tokens.csv.gz"
LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 64
NO_ROWS = np.zeros((1, 1), np.float32)
Ids = NDArray[np.int32]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("prediction") / "bundle", model)


def routing(tokens: int, seed: int, *, layers: int = LAYERS) -> Ids:
    """[layers, tokens, top_k], each expert of a row once."""
    rng = np.random.default_rng(seed)
    drawn = [[rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)] for _ in range(layers)]
    return np.array(drawn, np.int32)


@given(tokens=st.integers(1, 30), seed=st.integers(0, 99), fades_to=st.sampled_from([1.0, 0.9, 0.5]))
@settings(max_examples=40, deadline=None)
def test_affinity_is_what_counting_by_hand_gives(tokens: int, seed: int, fades_to: float) -> None:
    ids = routing(tokens, seed)
    affinity = Affinity(LAYERS, EXPERTS, fades_to=fades_to)
    affinity.learn(ids)
    chosen = ids[:, -1:]
    for place in range(LAYERS - 1):
        follows = np.zeros((EXPERTS, EXPERTS))
        for token in range(tokens):
            worth = fades_to ** (tokens - token)
            for first in ids[place, token]:
                follows[first, ids[place + 1, token]] += worth
        uses, share = follows.sum(axis=1) / TOP_K, follows.sum(axis=0) / follows.sum()
        rows = [(follows[first] + share) / (uses[first] + 1.0) for first in chosen[place, 0]]
        found = affinity.scores(place, NO_ROWS, chosen[place])
        np.testing.assert_allclose(found[0], np.sum(rows, axis=0), rtol=1e-4)
    assert affinity.reaches(LAYERS - 2)
    assert not affinity.reaches(LAYERS - 1)


def test_affinity_learns_what_always_follows_and_forgets_it_again() -> None:
    affinity = Affinity(2, EXPERTS, fades_to=0.9)
    here = np.array([[0, 1]], np.int32)
    for following, times in (((2, 3), 200), ((4, 5), 20)):
        step = np.array([here, [following]], np.int32)
        for _ in range(times):
            affinity.learn(step)
        assert set(likeliest(affinity.scores(0, NO_ROWS, here), TOP_K)[0].tolist()) == set(following)


def test_affinity_names_experts_of_recorded_routing() -> None:
    tokens = np.array(decode_routing(RECORDED), np.int32)  # [tokens, layers, top_k]
    layers, top_k = tokens.shape[1:]
    affinity = Affinity(layers, 128)
    named = compared = 0
    for token, ids in enumerate(tokens[:, :, None]):
        if token >= 20:
            compared += (layers - 1) * top_k
            named += sum(recalled(affinity, p, NO_ROWS, ids[p], ids[p + 1]) for p in range(layers - 1))
        affinity.learn(ids)
    assert named / compared > 0.3  # by chance 0.05


@given(seed=st.integers(0, 99), silent=st.integers(0, HIDDEN - 1))
@settings(max_examples=30, deadline=None)
def test_a_folded_gate_sees_what_the_next_norm_would_make_of_the_same_hidden_state(
    seed: int, silent: int
) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=HIDDEN)
    hidden[silent] = 0.0
    own, following = rng.uniform(0.5, 2, HIDDEN), rng.uniform(0.5, 2, HIDDEN)
    own[silent] = 0.0  # that channel can't be had back
    gate = rng.normal(size=(EXPERTS, HIDDEN))
    norm = np.sqrt((hidden**2).mean())
    got = folded(*(a.astype(np.float32) for a in (gate, own, following))) @ (hidden / norm * own)
    np.testing.assert_allclose(got, gate @ (hidden / norm * following), rtol=1e-3, atol=1e-4)


def test_the_next_gate_scores_as_the_bundles_router_does(bundle: Bundle) -> None:
    gates = next_gates(bundle, bundle.manifest.layers)
    assert len(gates) == LAYERS - 1
    predictor = NextGate(gates)
    assert [predictor.reaches(place) for place in range(LAYERS)] == [True, True, False]
    blocks = bundle.manifest.layers
    norms, routers = [], []
    for block in blocks:
        experts = next(o for o in block.operations if o.kind == "experts")
        makes = {name: o for o in block.operations for name in o.outputs}
        norm, router = (makes[name] for name in experts.inputs)
        norms.append(read_tensor(bundle, norm.weights["weight"]).reshape(-1))
        routers.append(read_tensor(bundle, router.weights["weight"]))
    normed = np.random.default_rng(3).normal(size=(200, HIDDEN)).astype(np.float32)
    for place in range(LAYERS - 1):
        wanted_scores = (normed * norms[place + 1]) @ routers[place + 1].T
        scores = predictor.scores(place, normed * norms[place], np.zeros((200, TOP_K), np.int32))
        np.testing.assert_allclose(scores, wanted_scores, atol=0.05 * np.abs(wanted_scores).max())
        following = likeliest(wanted_scores, TOP_K)
        named = recalled(predictor, place, normed * norms[place], following, following)
        assert named > 0.95 * following.size


def test_blocks_without_experts_have_no_gates(tmp_path: Path) -> None:
    dense = build_tiny_bundle(tmp_path / "dense", TinyModel(layers=2))
    assert next_gates(dense, dense.manifest.layers) == []


@given(
    scores=st.lists(
        st.lists(st.integers(-50, 50), min_size=6, max_size=6, unique=True), min_size=1, max_size=4
    ),
    most=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_what_is_wanted_is_each_rows_best_and_the_best_of_all_comes_first(
    scores: list[list[int]], most: int
) -> None:
    table = np.array(scores, np.float32)
    found = wanted(table, most)
    by_row = [sorted(range(6), key=lambda e: -row[e])[:most] for row in scores]
    assert set(found) == {expert for row in by_row for expert in row}
    assert len(set(found)) == len(found)
    if len(scores) == 1:
        assert found == by_row[0]


def test_the_better_predictor_is_chosen() -> None:
    predictors = [Affinity(2, EXPERTS), NextGate([None])]
    assert best_of(predictors, [3, 7]) is predictors[1]
    assert best_of(predictors, [7, 7]) is predictors[0]
    assert best_of(predictors, [0, 0]) is None
    assert best_of([], []) is None


@given(places=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_all_layers_are_looked_at_in_turns_and_few_at_a_time(places: int) -> None:
    turns = -(-places // COMPARED_PLACES)
    looks = [looked_at(step, places) for step in range(1, turns * COMPARES_EVERY_STEPS + 1)]
    assert sorted(place for look in looks for place in look) == list(range(places))
    assert max(len(look) for look in looks) <= COMPARED_PLACES


def test_recall_is_counted_for_the_layer_that_was_guessed_and_the_better_predictor_used() -> None:
    """Every expert is followed by itself, which counts learn, and a gate that was never asked for can't say."""
    statistics = CacheStatistics(range(10, 13))
    recall = Recall((10, 11, 12), NextGate([None, None]), affinity := Affinity(3, EXPERTS), statistics)
    assert recall.best(0) is None
    rng = np.random.default_rng(0)
    for _ in range(100 * COMPARES_EVERY_STEPS):
        ids = rng.permutation(EXPERTS)[None, :TOP_K].astype(np.int32)
        if recall.begin_step(1):
            for place in range(3):
                recall.note(place, NO_ROWS, ids)
            recall.end_step()
    assert statistics.layers[10].compared == 0
    for layer in (11, 12):
        own = statistics.layers[layer]
        assert own.compared == 100 * TOP_K
        assert own.named_by_gate == 0
        assert own.affinity_recall > 0.9
    assert recall.recall > 0.9
    assert recall.best(0) is recall.best(1) is affinity


def test_steps_that_end_in_between_count_nothing() -> None:
    statistics = CacheStatistics(range(3))
    recall = Recall(range(3), NextGate([None, None]), Affinity(3, EXPERTS), statistics)
    ids = np.array([[0, 1]], np.int32)
    for _ in range(3 * COMPARES_EVERY_STEPS):
        recall.begin_step(1)
        for place in (0, 1):
            recall.note(place, NO_ROWS, ids)
        recall.end_step()
    assert statistics.total.compared == 0
    assert recall.best(0) is None
