"""The schemes that drafting is compared with: played draw by draw they come to the field's formulas."""

from __future__ import annotations

import random

import pytest

from benchmarks.simulator.baselines import (
    Costs,
    best,
    expected_ids,
    loop_decoding,
    pearl,
    pearl_rate,
    synchronous,
    synchronous_rate,
)
from benchmarks.synchronous_drafts import SynchronousLoop
from edge_runtime.speculative.draft_loop import Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Proposal

TOKENS = 20_000


def costs(acceptance: float, delay: float = 0.1) -> Costs:
    return Costs(acceptance, delay, 0.004, lambda rows: 0.04 + 0.0002 * rows)


@pytest.mark.parametrize("acceptance", [0.3, 0.74, 0.93])
@pytest.mark.parametrize("length", [1, 4, 16])
def test_rounds_bring_what_the_formulas_say(acceptance: float, length: int) -> None:
    one = costs(acceptance)
    loop_seconds = one.loop_delay_seconds + one.verify_seconds(length + 1)
    wanted = synchronous_rate(acceptance, length, one.draft_seconds, loop_seconds)
    assert synchronous(one, length, TOKENS, random.Random(1)) == pytest.approx(wanted, rel=0.03)
    assert pearl(one, length, TOKENS, random.Random(2)) == pytest.approx(pearl_rate(one, length), rel=0.03)


def test_one_token_a_loop_is_what_no_draft_is_ever_right_comes_to() -> None:
    one = costs(0.0)
    assert loop_decoding(one) == pytest.approx(1 / 0.1402)
    assert pearl_rate(one, 4) == pytest.approx(loop_decoding(one))  # drafting costs it nothing
    assert synchronous(one, 1, 1000, random.Random(0)) < loop_decoding(one)
    assert expected_ids(0.0, 7) == 1
    assert expected_ids(1.0, 7) == 8


def test_pearl_hides_drafting_where_drafting_takes_most_of_the_time() -> None:
    """arXiv 2408.11850: the point of the scheme is a draft that is slow beside a near target."""
    near = Costs(0.93, 0.0, 0.01, lambda rows: 0.04 + 0.0002 * rows)
    assert best(pearl, near)[0] > 1.2 * best(synchronous, near)[0]


def test_pearl_s_lock_step_gains_nothing_far_away() -> None:
    """Research note, section 3: at R = 100 ms and acceptance 0.74 it falls below tuned drafting in turns."""
    far = costs(0.74, delay=0.1)
    assert best(pearl, far)[0] < best(synchronous, far)[0]


def proposal(*ids: int) -> Proposal:
    return Proposal(ids, tuple(range(-1, len(ids) - 1)), (0.9,) * len(ids), "test")


def test_in_turns_nothing_is_drafted_before_the_verdict() -> None:
    loop = SynchronousLoop(5, 40, 100)
    assert loop.committed(5, (7,), 0.0) == [Extend((7,)), Propose(1, SynchronousLoop.tally.best_length, 1)]
    sent = loop.proposed(1, proposal(1, 2, 3), 0.0, 0.01)
    assert isinstance(sent[0], SendDrafts)
    assert (sent[0].frame.base_row, sent[0].frame.ids) == (6, (1, 2, 3))
    assert loop.committed(6, (1,), 0.1) == []  # right so far: two more are being judged
    actions = loop.committed(7, (2, 9), 0.2)
    assert actions[:2] == [Rewind(8), Extend((9,))]
    assert isinstance(actions[2], Propose)
    assert loop.turn == 8


def test_ids_that_the_target_made_meanwhile_are_left_out_of_the_next_window() -> None:
    loop = SynchronousLoop(5, 40, 100)
    loop.committed(5, (7,), 0.0)
    assert loop.committed(6, (1,), 0.0) == [Extend((1,))]
    sent = loop.proposed(1, proposal(1, 2, 3), 0.0, 0.01)
    assert isinstance(sent[0], SendDrafts)
    assert (sent[0].frame.base_row, sent[0].frame.ids) == (7, (2, 3))
    other = SynchronousLoop(5, 40, 100)
    other.committed(5, (7,), 0.0)
    other.committed(6, (4,), 0.0)
    (again,) = other.proposed(1, proposal(1, 2, 3), 0.0, 0.01)
    assert isinstance(again, Propose)
