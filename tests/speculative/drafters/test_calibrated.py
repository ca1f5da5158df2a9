"""Probabilities by length of match: what comes true is believed, what does not is not, and verdicts count once."""

from __future__ import annotations

import pytest

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.drafters.calibrated import FIRST_WORTH, LENGTHS, Calibrated
from edge_runtime.speculative.drafters.suffix import SuffixDrafter

GREEDY = SamplingParams(temperature=0.0)
COPIED = [*range(10, 40), 99, *range(10, 25)]  # a match of 15: 25 follows
SHORT = [1, 2, 3, 4, 5, 6, 2]  # a match of 1: 3 follows


@pytest.fixture
def drafter() -> Calibrated:
    return Calibrated(SuffixDrafter())


def test_guesses_are_the_inner_drafters_and_long_matches_are_believed_more(drafter: Calibrated) -> None:
    inner = SuffixDrafter()
    for ids in (COPIED, SHORT):
        inner.begin(ids, GREEDY)
        drafter.begin(ids, GREEDY)
        assert drafter.propose(4).ids == inner.propose(4).ids
    drafter.begin(COPIED, GREEDY)
    long = drafter.propose(2).probabilities
    drafter.begin(SHORT, GREEDY)
    short = drafter.propose(1).probabilities
    assert short[0] == pytest.approx(FIRST_WORTH[0])
    assert short[0] < long[0] <= long[1] < 1


def test_what_comes_true_is_believed_and_what_does_not_is_not(drafter: Calibrated) -> None:
    for _ in range(100):
        drafter.begin(SHORT, GREEDY)
        drafter.extend(drafter.propose(1).ids)
        drafter.end()
    assert drafter.worth_of(1) > 0.9
    assert drafter.worth_of(2) == FIRST_WORTH[1]
    for _ in range(100):
        drafter.begin(COPIED, GREEDY)
        drafter.extend(drafter.propose(1).ids)
        drafter.rewind(len(COPIED))
    assert drafter.worth_of(15) < 0.1


def test_drafts_after_a_miss_are_not_judged(drafter: Calibrated) -> None:
    other = Calibrated(SuffixDrafter())
    drafter.begin(COPIED, GREEDY)
    drafter.extend(drafter.propose(6).ids)
    drafter.rewind(len(COPIED) + 1)  # one right, one wrong, four never looked at
    other.begin(COPIED, GREEDY)
    other.extend(other.propose(2).ids)
    other.rewind(len(COPIED) + 1)
    assert [drafter.worth_of(m) for m in LENGTHS] == [other.worth_of(m) for m in LENGTHS]
    drafter.rewind(len(COPIED))  # they are judged once
    assert [drafter.worth_of(m) for m in LENGTHS] == [other.worth_of(m) for m in LENGTHS]


def test_ids_that_it_did_not_guess_are_no_drafts(drafter: Calibrated) -> None:
    drafter.begin(COPIED, GREEDY)
    drafter.propose(2)
    drafter.extend([77])
    drafter.rewind(len(COPIED))
    assert drafter.worth_of(15) == pytest.approx(FIRST_WORTH[6])


def test_the_first_ids_of_a_tree_keep_what_stands_beside_them() -> None:
    tree = Proposal((1, 2, 3, 4, 5, 6), (-1, 0, 1, -1, 0, 2), (0.9, 0.8, 0.7, 0.1, 0.2, 0.3), "toy", 5)
    assert tree.first(3) is tree
    assert tree.first(1) == Proposal((1, 4), (-1, -1), (0.9, 0.1), "toy", 5)
    assert tree.first(2) == Proposal((1, 2, 4, 5), (-1, 0, -1, 0), (0.9, 0.8, 0.1, 0.2), "toy", 5)
