"""The chooser over a real model and a real suffix drafter: who drafts when, what it learns, and that both keep up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import SamplingParams
from edge_runtime.errors import UsageError
from edge_runtime.speculative.drafters.calibrated import Calibrated
from edge_runtime.speculative.drafters.choose import DraftBudget, make_drafter, tokenizer_digest
from edge_runtime.speculative.drafters.chooser import FIRST_GUESS, Acceptance, Chooser
from edge_runtime.speculative.drafters.model import ModelDrafter
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

GREEDY = SamplingParams(temperature=0.0)
COPIED = [*range(10, 40), 99, *range(10, 25)]  # 25 follows, as far as copying tells
NOVEL = [150, 3, 77, 120]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("draft") / "bundle", TinyModel(layers=2))


@pytest.fixture
def model(bundle: Bundle) -> Iterator[ModelDrafter]:
    drafter = ModelDrafter(bundle, kv_bytes=1 << 20)
    yield drafter
    drafter.close()


@pytest.fixture
def chooser(bundle: Bundle) -> Iterator[Chooser]:
    made = make_drafter("auto", bundle=bundle)
    assert isinstance(made, Chooser)
    yield made
    made.close()


def test_copies_are_drafted_by_the_suffix_drafter_and_novel_text_by_the_model(
    chooser: Chooser, model: ModelDrafter
) -> None:
    chooser.begin(COPIED, GREEDY)
    proposal = chooser.propose(6)
    assert (proposal.source, proposal.ids) == ("suffix", tuple(range(25, 31)))
    chooser.begin(NOVEL, GREEDY)
    model.begin(NOVEL, GREEDY)
    assert chooser.propose(6) == model.propose(6)
    assert chooser.propose(6).source == "model"


def test_the_suffix_drafter_gets_the_step_iff_it_expects_at_least_as_much(chooser: Chooser) -> None:
    """A long match, against a model that is taken to be right 0.6 of the time …"""
    chooser.begin(COPIED, GREEDY)
    assert chooser.propose(1).source == "suffix"
    for _ in range(60):  # … until it turns out to be right always
        chooser.begin(NOVEL, GREEDY)
        chooser.extend(chooser.propose(3).ids)
        chooser.end()
    assert chooser.acceptance_of("model") > 0.95
    chooser.begin(COPIED, GREEDY)
    assert chooser.propose(1).source == "model"


def test_one_id_that_stood_before_is_no_reason_to_follow_what_came_then(chooser: Chooser) -> None:
    chooser.begin([150, 3, 77, 120, 9, 77], GREEDY)
    assert chooser.propose(1).source == "model"


def test_what_goes_on_for_long_is_followed_even_if_one_id_is_asked_for(chooser: Chooser) -> None:
    chooser.begin(COPIED, GREEDY)
    assert chooser.propose(1).ids == (25,)
    assert chooser.propose(3).ids == (25, 26, 27)


def test_a_model_that_is_always_wrong_gives_way(chooser: Chooser) -> None:
    chooser.begin(NOVEL, GREEDY)
    length = len(NOVEL)
    for _ in range(60):
        proposal = chooser.propose(2)
        if proposal.source == "model":
            chooser.extend(proposal.ids)
        chooser.rewind(length)
        chooser.extend([(proposal.ids[0] + 1) % 200])
        length += 1
    assert chooser.acceptance_of("model") < 0.3


def test_only_drafts_up_to_the_miss_are_judged(chooser: Chooser) -> None:
    chooser.begin(NOVEL, GREEDY)
    chooser.extend(chooser.propose(5).ids)
    chooser.rewind(len(NOVEL) + 2)  # two right, one wrong, two never looked at
    expected = Acceptance()
    for is_right in (True, True, False):
        expected.judged(is_right=is_right)
    assert chooser.acceptance_of("model") == expected.rate
    chooser.rewind(len(NOVEL) + 1)  # they are judged once
    assert chooser.acceptance_of("model") == expected.rate
    assert chooser.acceptance_of("suffix") == FIRST_GUESS


def test_committed_ids_are_nobodys_drafts(chooser: Chooser) -> None:
    chooser.begin(NOVEL, GREEDY)
    drafted = chooser.propose(2).ids
    chooser.extend([(drafted[0] + 1) % 200, 5])
    chooser.rewind(len(NOVEL))
    assert chooser.acceptance_of("model") == FIRST_GUESS


def test_both_follow_the_sequence(chooser: Chooser, model: ModelDrafter) -> None:
    suffix = SuffixDrafter()
    chooser.begin(COPIED, GREEDY)
    chooser.extend(chooser.propose(4).ids)
    chooser.rewind(len(COPIED) + 1)
    chooser.extend([180, 3])
    ids = [*COPIED, 25, 180, 3]
    for drafter in (model, suffix):
        drafter.begin(ids, GREEDY)
    assert chooser.propose(4).ids in (model.propose(4).ids, suffix.propose(4).ids)
    chooser.extend(list(range(10, 20)))
    suffix.extend(list(range(10, 20)))
    assert chooser.propose(4).ids == suffix.propose(4).ids
    assert chooser.memory_bytes > model.memory_bytes


def test_names_stand_for_drafters(bundle: Bundle, tmp_path: Path) -> None:
    small = DraftBudget(kv_bytes=1 << 20)
    with pytest.raises(UsageError, match="needs the model"):
        make_drafter("model")
    digest = tokenizer_digest(bundle)
    made = make_drafter("model", bundle=bundle, target_tokenizer=digest, budget=small, executor="native")
    assert isinstance(made, ModelDrafter)
    made.close()
    assert isinstance(make_drafter("auto"), Calibrated)
    other = build_tiny_bundle(tmp_path / "other", TinyModel(layers=1), tokenizer=b'{"other": 1}')
    with pytest.raises(UsageError, match="another tokenizer"):
        make_drafter("auto", bundle=other, target_tokenizer=digest)
