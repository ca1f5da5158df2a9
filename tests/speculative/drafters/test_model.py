"""The model drafter against the same model sampled without it; going back, windows of long texts, its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from edge_kernels import reference_sampling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.sampler import Sampler
from edge_runtime.errors import CapacityError, UsageError
from edge_runtime.speculative.drafters.base import ROOT
from edge_runtime.speculative.drafters.favoured import favoured
from edge_runtime.speculative.drafters.model import ModelDrafter
from edge_runtime.speculative.drafters.window import Window
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

VOCABULARY = 200
KV_BYTES = 1 << 20
PAGE_BYTES = 2 * 2 * 32 * 2 * 16 * 4  # layers, keys and values, tokens, heads, numbers, bytes
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=2**63 + 5)
PENALISED = SamplingParams(
    seed=7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((3, 2.0),)
)
PROMPT = [5, 17, 17, 120, 9, 44]

Load = Callable[..., ModelDrafter]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("draft") / "bundle", TinyModel(layers=2))


@pytest.fixture
def load(bundle: Bundle) -> Iterator[Load]:
    loaded: list[ModelDrafter] = []

    def load(kv_bytes: int = KV_BYTES, executor: str = "native") -> ModelDrafter:
        loaded.append(ModelDrafter(bundle, kv_bytes=kv_bytes, executor=executor))
        return loaded[-1]

    yield load
    for drafter in loaded:
        drafter.close()


@pytest.fixture
def pair(load: Load) -> tuple[ModelDrafter, ModelDrafter]:
    return load(), load()


def sampled_alone(bundle: Bundle, ids: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """What the model itself writes after `ids`: one whole run per id."""
    stage = CpuStage.load(bundle, LayerRange(0, 1), threads=1, kv_budget_bytes=KV_BYTES, executor="native")
    sampler = Sampler(params, VOCABULARY)
    sampler.observe(ids, generated=False)
    written: list[int] = []
    for _ in range(count):
        sequence = (*ids, *written)
        stage.open(SessionId(1), len(sequence))
        logits = stage.run(Batch((Span(SessionId(1), 0, sequence, 1),), None))[0]
        stage.drop(SessionId(1))
        token, _ = sampler.sample(logits, len(sequence))
        sampler.observe([token], generated=True)
        written.append(token)
    stage.close()
    return written


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_a_model_that_is_its_own_target_is_always_right(
    bundle: Bundle, load: Load, params: SamplingParams
) -> None:
    written = sampled_alone(bundle, PROMPT, params, 12)
    drafter = load()
    drafter.begin(PROMPT, params)
    for first in range(0, 12, 4):
        proposal = drafter.propose(4)
        assert list(proposal.ids) == written[first : first + 4]
        assert proposal.parents == (ROOT, 0, 1, 2)
        assert all(0 < probability <= 1 for probability in proposal.probabilities)
        drafter.extend(proposal.ids)


def test_onnx_runtime_drafts_alike(load: Load) -> None:
    proposals = []
    for executor in ("native", "onnx"):
        drafter = load(executor=executor)
        drafter.begin(PROMPT, SAMPLED)
        proposals.append(drafter.propose(6, 2))
    assert proposals[0].ids == proposals[1].ids
    assert np.allclose(proposals[0].probabilities, proposals[1].probabilities, atol=1e-3)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)),
        st.tuples(st.just("rewind"), st.integers(1, 40)),
        st.tuples(st.just("propose"), st.integers(1, 5)),
        st.tuples(st.just("accept"), st.integers(1, 5)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_history_drafts_as_a_new_drafter_given_the_same_ids(
    pair: tuple[ModelDrafter, ModelDrafter], steps: list[tuple[str, object]]
) -> None:
    """The same two drafters serve all examples: requests leave nothing behind."""
    (drafter, fresh), ids = pair, list(PROMPT)
    drafter.begin(PROMPT, SAMPLED)
    for what, argument in steps:
        if what == "extend":
            assert isinstance(argument, list)
            ids += argument
            drafter.extend(argument)
        elif what == "rewind":
            assert isinstance(argument, int)
            ids = ids[: max(argument, 1)]
            drafter.rewind(len(ids))
        else:
            assert isinstance(argument, int)
            proposal = drafter.propose(argument, 2)
            if what == "accept":
                chain = proposal.ids[: proposal.chain_length]
                ids += chain
                drafter.extend(chain)
    fresh.begin(ids, SAMPLED)
    assert drafter.propose(4, 3) == fresh.propose(4, 3)
    drafter.end()
    fresh.end()


def test_only_new_rows_are_computed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, rows = load(), []
    run = drafter._stage.run

    def counted(batch: Batch) -> object:
        rows.append(len(batch.spans[0].ids))
        return run(batch)

    monkeypatch.setattr(drafter._stage, "run", counted)
    drafter.begin(list(range(100)), GREEDY)
    drafter.extend(drafter.propose(4).ids)
    assert rows == [100, 1, 1, 1]
    drafter.propose(4)
    assert rows == [100, 1, 1, 1, 1, 1, 1, 1]  # the last draft was never a row
    drafter.rewind(102)
    drafter.extend([77])
    rows.clear()
    drafter.propose(1)
    assert rows == [1]


def test_side_nodes_are_the_runners_up_of_the_chain(load: Load) -> None:
    drafter = load()
    drafter.begin(PROMPT, SAMPLED)
    chain, tree = drafter.propose(3), drafter.propose(3, 3)
    assert tree.ids[:3] == chain.ids
    assert tree.chain_length == 3
    sides = list(zip(tree.ids, tree.parents, strict=True))[3:]
    assert [parent for _, parent in sides] == [ROOT, ROOT, 0, 0, 1, 1]
    for token, parent in sides:
        assert token != chain.ids[parent + 1]
    assert tree.probabilities[3] >= tree.probabilities[4]


def test_a_text_far_beyond_the_budget_is_drafted_from_a_window(bundle: Bundle, load: Load) -> None:
    """4 pages hold 128 rows; the text has 3 000 ids, six times the model's context."""
    budget = 4 * PAGE_BYTES
    drafter, window, start = load(budget), Window(128), 0
    text = np.random.default_rng(4).integers(0, VOCABULARY, 3000).tolist()
    drafter.begin(text[:1], GREEDY)
    length, starts = 1, set()
    while length + 7 < len(text):
        drafter.extend(text[length : length + 7])
        length += 7
        start = window.start(length, 3, start)
        starts.add(start)
        proposal = drafter.propose(3)
        assert drafter.kv_bytes <= budget
        if length % 10 == 1:
            seen = [*text[: window.anchor], *text[start:length]]
            assert list(proposal.ids) == sampled_alone(bundle, seen, GREEDY, 3)
    assert 40 < len(starts) < 60  # once in 57 ids or so, not at each step
    drafter.rewind(20)  # before the window
    assert list(drafter.propose(3).ids) == sampled_alone(bundle, text[:20], GREEDY, 3)
    assert len(drafter.propose(1000).ids) == window.longest_draft


@given(
    rows=st.integers(4, 200),
    moves=st.lists(st.tuples(st.integers(-300, 300), st.integers(1, 50)), max_size=30),
)
def test_a_window_and_its_room_always_fit(rows: int, moves: list[tuple[int, int]]) -> None:
    window, length, start = Window(rows), 1, 0
    for change, room in moves:
        length, room = max(length + change, 1), min(room, window.longest_draft)
        start = window.start(length, room, start)
        ids = window.ids(range(length), start)
        assert len(ids) + room <= rows
        assert ids[-1] == length - 1
        assert len(set(ids)) == len(ids)
        assert start == window.anchor or len(ids) >= rows // 4


@settings(deadline=None)
@given(
    eighths=st.lists(st.integers(-64, 64), min_size=2, max_size=60, unique=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
)
def test_favourites_are_the_reference_samplers_best_in_order(
    eighths: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    values = np.array(eighths, np.float64) / 8
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ids: np.ndarray
    if temperature == 0.0:
        ids, scores = np.arange(len(values)), values
    else:
        ids, d = reference_sampling.survivors(
            values, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        scores = d + reference_sampling.gumbel_noise(seed, 9, ids)
    wanted = ids[np.argsort(-scores, kind="stable")][:4].tolist()
    found = favoured(values, params, 9, 4)
    assert [favourite.token for favourite in found] == wanted
    shares = [favourite.probability for favourite in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1 + 1e-9


def test_ids_that_only_the_target_knows_are_taken_for_some_other(load: Load) -> None:
    drafter = load()
    drafter.begin([*PROMPT, VOCABULARY + 3], SamplingParams(logit_bias=((VOCABULARY + 3, 50.0),)))
    assert all(token < VOCABULARY for token in drafter.propose(4).ids)


def test_a_model_that_writes_no_text_and_a_budget_below_a_page_are_refused(
    tmp_path: Path, load: Load
) -> None:
    encoder = build_tiny_bundle(tmp_path / "encoder", TinyModel(layers=2, kind="encoder"))
    with pytest.raises(UsageError, match="can't draft"):
        ModelDrafter(encoder, kv_bytes=KV_BYTES)
    with pytest.raises(CapacityError, match="KV memory"):
        load(PAGE_BYTES - 1)


def test_memory_is_weights_rows_and_ids(load: Load) -> None:
    drafter = load()
    empty = drafter.memory_bytes
    drafter.begin(PROMPT, GREEDY)
    drafter.propose(2)
    assert drafter.kv_bytes == PAGE_BYTES
    assert drafter.memory_bytes == empty + PAGE_BYTES + 4 * len(PROMPT)
    drafter.end()
    assert drafter.memory_bytes == empty
