"""A trial finds what is faster, starts and ends on the safe side, and costs few tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.experts.trial import Trial, TrialRules

RULES = TrialRules(warm_up_tokens=10, again_tokens=100, most_again_tokens=400)
TRIED = 2 * RULES.block_tokens * RULES.pairs


def make(
    trial: Trial, tokens: int, on_seconds: float, *, drift: float = 0.0, on_bytes: int = 10
) -> list[bool]:
    """Tokens of 1 s without it; which of them had it."""
    had = []
    for token in range(tokens):
        is_on = trial.is_on
        had.append(is_on)
        slow = 1.0 + drift * token
        trial.made(slow * (on_seconds if is_on else 1.0), on_bytes if is_on else 10)
    return had


@given(gain=st.floats(-0.5, 0.5), drift=st.floats(-0.002, 0.002))
@settings(max_examples=60, deadline=None)
def test_only_a_clear_gain_switches_it_on_however_the_machine_drifts(gain: float, drift: float) -> None:
    trial = Trial("it", RULES)
    had = make(trial, RULES.warm_up_tokens + TRIED + 5, 1.0 - gain, drift=drift)
    assert not any(had[: RULES.warm_up_tokens])
    if gain > RULES.win_gain + 0.02:
        assert trial.is_on
    if gain < RULES.win_gain - 0.02:
        assert not trial.is_on
    assert sum(had[: RULES.warm_up_tokens + TRIED]) <= TRIED // 2


@given(
    seconds=st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=400),
    reasons=st.sampled_from(["", "nobody knows"]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_off_or_tried_or_won_whatever_was_measured(seconds: list[float], reasons: str) -> None:
    trial = Trial("it", RULES)
    had = []
    for each in seconds:
        had.append(trial.is_on)
        trial.made(each, 1, reasons)
        assert trial.says
    if reasons:
        assert not any(had)
    tried = had[RULES.warm_up_tokens : RULES.warm_up_tokens + TRIED]
    assert sum(tried) <= TRIED // 2  # also where it was given up


def test_what_is_much_slower_is_given_up_early_and_tried_again_ever_more_rarely() -> None:
    trial = Trial("it", RULES)
    had = make(trial, 2000, 2.0, on_bytes=15)
    pairs = 2 * RULES.block_tokens * RULES.give_up_pairs
    assert trial.says == f"off, lost 100% of the time over {pairs} tokens, with +50% bytes read"
    starts = [at for at in range(1, len(had)) if had[at] and not any(had[max(0, at - 30) : at])]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps[0] == RULES.again_tokens + pairs
    assert gaps[0] < gaps[1] < gaps[2] == gaps[-1] == RULES.most_again_tokens + pairs
    assert sum(had) == len(starts) * pairs // 2


def test_what_has_won_stays_until_it_loses() -> None:
    trial = Trial("it", RULES)
    make(trial, RULES.warm_up_tokens + TRIED, 0.8)
    assert trial.is_on
    assert trial.says == f"on, won 20% of the time over {TRIED} tokens, with +0% bytes read"
    make(trial, RULES.again_tokens + TRIED, 0.99)  # less than what switches it on, and still no loss
    assert trial.is_on
    make(trial, 2 * RULES.again_tokens + TRIED, 1.1)
    assert not trial.is_on


def test_a_trial_begins_when_there_is_nothing_against_it() -> None:
    trial = Trial("it", RULES)
    for _ in range(50):
        trial.made(1.0, 1, "everything is in memory")
    assert trial.says == "off, not tried: everything is in memory"
    trial.made(1.0, 1)
    assert trial.is_trying
    assert trial.says == "being tried (0 of 8 pairs)"


@pytest.mark.parametrize("spike", [100.0, 1e6])
def test_one_long_token_decides_nothing(spike: float) -> None:
    trial = Trial("it", RULES)
    for token in range(RULES.warm_up_tokens + TRIED):
        slow = spike if token == RULES.warm_up_tokens + 5 else 1.0
        trial.made(slow * (0.9 if trial.is_on else 1.0), 1)
    assert trial.is_on
