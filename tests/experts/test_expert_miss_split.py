"""Flash or a peer: the decision, the figures it goes by, and when a peer that failed is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.experts.measured_line import MeasuredLine
from edge_runtime.experts.miss_split import Division, HereCost, Line, Miss, PeerCost, divide
from edge_runtime.experts.peer_standing import (
    CHECKS,
    FIRST_LATE_SECONDS,
    LEAST_LATE_SECONDS,
    LEAST_REST_SECONDS,
    MOST_LATE_SECONDS,
    SHARE_OF_TRIALS,
    PeerStanding,
)

MANY = 1 << 20
seconds = st.floats(0.0, 1.0)
lines = st.builds(Line, seconds, seconds)
uses = st.integers(1, 40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Miss], HereCost, list[PeerCost]]:
    peers = draw(st.lists(st.builds(PeerCost, lines, st.integers(0, 100)), max_size=3))
    holders = st.lists(st.integers(0, len(peers) - 1), unique=True).map(tuple) if peers else st.just(())
    wanted = draw(st.lists(st.tuples(uses, holders), max_size=10))
    misses = [Miss(expert, rows, held) for expert, (rows, held) in enumerate(wanted)]
    return misses, HereCost(draw(lines), draw(lines), draw(st.integers(0, 8))), peers


def end_of(misses: list[Miss], here: HereCost, peers: list[PeerCost], asked: list[tuple[int, ...]]) -> float:
    """By the model, when every peer p is asked for the experts asked[p] and the others are read."""
    away = {expert for experts in asked for expert in experts}
    rows = {miss.expert: miss.uses for miss in misses}
    read = [miss.uses for miss in misses if miss.expert not in away]
    theirs = [
        peer.line.seconds(sum(rows[expert] for expert in experts))
        for peer, experts in zip(peers, asked, strict=True)
    ]
    return max([here.seconds(len(read), sum(read)), *theirs])


@given(problems(), st.integers(0, 3))
def test_everything_is_somewhere_and_nobody_is_asked_for_what_it_has_not(
    problem: tuple[list[Miss], HereCost, list[PeerCost]], least_reads: int
) -> None:
    misses, here, peers = problem
    found = divide(misses, here, peers, least_reads)
    assert sorted([*found.read, *(e for experts in found.asked for e in experts)]) == list(range(len(misses)))
    for number, (experts, peer) in enumerate(zip(found.asked, peers, strict=True)):
        assert all(number in misses[expert].holders for expert in experts)
        assert sum(misses[expert].uses for expert in experts) <= peer.most_uses
    assert len(found.read) >= min(least_reads, len(misses))
    assert found.seconds == pytest.approx(end_of(misses, here, peers, list(found.asked)))
    assert divide(list(reversed(misses)), here, peers, least_reads) == found


@given(problems())
def test_it_is_never_slower_than_flash_alone_or_one_peer_alone(
    problem: tuple[list[Miss], HereCost, list[PeerCost]],
) -> None:
    misses, here, peers = problem
    found = divide(misses, here, peers)
    assert found.seconds <= end_of(misses, here, peers, [() for _ in peers]) + 1e-12
    everything = tuple(miss.expert for miss in misses)
    for number, peer in enumerate(peers):
        only = [Miss(miss.expert, miss.uses, (number,)) for miss in misses]
        if sum(miss.uses for miss in misses) <= peer.most_uses:
            alone = [everything if other == number else () for other in range(len(peers))]
            assert divide(only, here, peers).seconds <= end_of(misses, here, peers, alone) + 1e-12


@given(st.integers(0, 12), lines, lines, lines, st.integers(0, 8))
def test_with_one_peer_and_one_row_it_is_the_best_of_all_divisions(
    count: int, reading: Line, computing: Line, peer: Line, hits: int
) -> None:
    here = HereCost(reading, computing, hits)
    found = divide([Miss(expert, 1, (0,)) for expert in range(count)], here, [PeerCost(peer, MANY)])
    best = min(max(here.seconds(reads, reads), peer.seconds(count - reads)) for reads in range(count + 1))
    assert found.seconds == pytest.approx(best)


def test_without_peers_or_with_a_slow_one_all_is_read() -> None:
    misses = [Miss(expert, 1, (0,)) for expert in range(4)]
    flash = HereCost(Line(1e-3, 1e-3))
    assert divide([Miss(1, 1), Miss(0, 2)], flash, []) == Division((0, 1), (), 3e-3)
    assert divide(misses, flash, [PeerCost(Line(1.0, 0.0), MANY)]).asked == ((),)
    assert divide(misses, flash, [PeerCost(Line(5e-3, 0.0), MANY)]).asked == ((),)  # no gain, no question
    assert divide(misses, flash, [PeerCost(Line(1e-4, 1e-4), 0)]).asked == ((),)


def test_experts_that_few_rows_want_are_given_away() -> None:
    misses = [Miss(0, 30, (0,)), Miss(1, 1, (0,)), Miss(2, 2, (0,))]
    found = divide(misses, HereCost(Line(0.0, 4e-3)), [PeerCost(Line(1e-3, 1e-3), MANY)])
    assert (found.read, found.asked) == ((0,), ((2, 1),))


# ---------------------------------------------------------------- what was measured


@given(lines, st.lists(st.integers(1, 9), min_size=24, max_size=40))
def test_a_line_is_found_again(line: Line, counts: list[int]) -> None:
    measured = MeasuredLine()
    for count in counts:
        measured.observe(count, line.seconds(count))
    for count in {*counts}:
        wanted = line.seconds(count)
        assert measured.line.seconds(count) == pytest.approx(wanted, rel=0.5, abs=1e-9)
    typical = sum(counts) / len(counts)
    assert measured.line.fixed_seconds <= line.fixed_seconds + line.each_seconds * typical + 1e-9


def test_nothing_is_known_at_first_and_one_count_says_little_about_others() -> None:
    measured = MeasuredLine()
    assert measured.line.seconds(3) == 0.0
    measured.observe(2, 4e-3)
    assert measured.line == Line(pytest.approx(0.0), pytest.approx(2e-3))


def test_a_change_is_seen_soon_and_a_hiccup_hardly() -> None:
    measured = MeasuredLine()
    for number in range(40):
        measured.observe(1 + number % 4, 1e-3)
    measured.observe(2, 5.0)
    assert measured.line.seconds(2) < 2.5e-3
    for _ in range(30):
        measured.observe(2, 1e-2)
    assert measured.line.seconds(2) == pytest.approx(1e-2, rel=0.2)
    for _ in range(5):
        measured.observe(2, 1e-3)
    assert measured.line.seconds(2) < 4e-3  # what is fast again is believed at once


# ---------------------------------------------------------------- who is asked again, and when


def known_peer(seconds: float = 1e-3) -> PeerStanding:
    peer = PeerStanding()
    for _ in range(CHECKS):
        peer.answered(1, seconds)
        peer.agreed(is_same=True)
    return peer


def test_a_peer_is_asked_once_its_first_answers_were_right() -> None:
    peer = PeerStanding()
    for _ in range(CHECKS):
        assert peer.is_due
        assert not peer.may_be_asked
        peer.answered(1, 1e-3)
        peer.agreed(is_same=True)
    assert peer.may_be_asked
    liar = PeerStanding()
    for number in range(CHECKS):
        liar.answered(1, 1e-3)
        liar.agreed(is_same=number < CHECKS - 1)
    assert liar.is_barred
    assert not liar.may_be_asked
    assert not liar.is_due


def test_a_peer_that_fails_rests_longer_each_time() -> None:
    peer = known_peer()
    assert peer.may_be_asked
    rests = []
    for _ in range(4):
        peer.failed(1e-3)
        assert not peer.may_be_asked
        passed = 0.0
        while not peer.is_due:
            peer.passed(0.1)
            passed += 0.1
        rests.append(passed)
    assert rests == pytest.approx([LEAST_REST_SECONDS * 2**n for n in range(4)], abs=0.2)
    peer.answered(1, 1e-3)
    assert peer.may_be_asked
    peer.failed(0.5)  # finding out took long: the next try comes later
    peer.passed(0.9 * 0.5 / SHARE_OF_TRIALS)
    assert not peer.is_due
    peer.passed(0.2 * 0.5 / SHARE_OF_TRIALS)
    assert peer.is_due


@given(st.floats(1e-4, 0.5))
def test_trials_of_a_slow_peer_take_a_small_share_of_the_time(slow_seconds: float) -> None:
    peer = known_peer(slow_seconds)
    worked, tried = 0.0, 0.0
    for _ in range(2000):
        worked += 0.05
        peer.passed(0.05)
        if peer.is_due:
            peer.answered(1, slow_seconds)
            tried += slow_seconds
    assert tried <= 1.05 * SHARE_OF_TRIALS * worked
    assert tried > 0 or slow_seconds > SHARE_OF_TRIALS * worked


def test_an_answer_is_waited_for_as_long_as_it_may_take() -> None:
    peer = PeerStanding()
    assert peer.late_seconds(1) == FIRST_LATE_SECONDS
    peer.answered(1, 1e-3)
    assert peer.late_seconds(1) == LEAST_LATE_SECONDS
    peer = PeerStanding()
    peer.answered(1, 0.05)
    assert peer.late_seconds(1) == pytest.approx(0.2)
    assert peer.late_seconds(1000) == MOST_LATE_SECONDS
    peer.answered(1, 0.5, waited=False)  # it was there when somebody looked: it took no longer than expected
    assert peer.late_seconds(1) == pytest.approx(0.2)
    peer.answered(1, 0.01, waited=False)
    assert peer.late_seconds(1) < 0.2
