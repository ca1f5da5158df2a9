"""Drafts are counted by what the target said, and a drafter that is always wrong is held to next to nothing."""

from __future__ import annotations

import pytest

from coordinator.sessions.draft_ledger import FIRST_CREDIT, DraftCounts, DraftLedger, check_draft
from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.messages import Draft


def chain(base_row: int, *ids: int, turn: int = 0) -> Draft:
    return Draft(0, 0, turn, base_row, tuple(range(base_row - 1, base_row - 1 + len(ids))), ids)


def test_right_guesses_are_accepted_and_a_miss_takes_the_rest_with_it() -> None:
    ledger = DraftLedger(10, 100)
    assert ledger.offer(chain(10, 1, 2, 3, 4))
    assert ledger.offer(chain(10, 1, 2, 3, 4))  # sent again: counted once
    assert ledger.committed(1) is True
    assert ledger.committed(9) is False
    assert ledger.turn == 11
    assert ledger.counts == DraftCounts(drafted=4, accepted=1, wasted=3)
    assert ledger.committed(3) is None


def test_who_is_always_wrong_buys_hardly_anything() -> None:
    ledger = DraftLedger(1, 10_000)
    for position in range(1, 2001):
        ledger.offer(chain(position, 1, 1, 1, 1, turn=ledger.turn))
        ledger.committed(0)
    assert ledger.counts.accepted == 0
    assert ledger.counts.wasted == ledger.counts.drafted <= FIRST_CREDIT + 2000 / 8


def test_the_future_is_not_forwarded() -> None:
    ledger = DraftLedger(10, 100_000)
    assert ledger.offer(chain(5000, 1)) is None
    assert ledger.offer(chain(10, 1, turn=10)) is None


@pytest.mark.parametrize("wrong", [chain(4), chain(4, 7), Draft(0, 0, 0, 4, (9,), (1,)), chain(0, 1)])
def test_what_is_no_draft_is_refused(wrong: Draft) -> None:
    with pytest.raises(ProtocolError):
        check_draft(wrong, 7)


def test_on_a_loaded_target_few_rows_are_wasted_whatever_a_device_does() -> None:
    """Half of its rows are right: idle, it is let; loaded, it is let hardly any."""
    wasted = []
    for load in (0.0, 1.0):
        ledger = DraftLedger(1, 100_000)
        for position in range(1, 4001, 2):
            ledger.offer(chain(position, 1, 0, turn=ledger.turn), load)
            ledger.committed(1, load)
            ledger.committed(1, load)
        wasted.append(ledger.counts.wasted)
    assert wasted[0] == 2000
    assert wasted[1] <= 0.03 * 4000


def test_credit_earned_on_an_idle_target_is_not_spent_on_a_loaded_one() -> None:
    ledger = DraftLedger(1, 10_000)
    assert ledger.offer(chain(1, *([1] * 9)), 1.0) is None
    assert ledger.offer(chain(1, *([1] * 9)), 0.0) == chain(1, *([1] * 9))


def test_with_little_credit_the_beginning_of_a_chain_goes_on_and_earns_for_more() -> None:
    ledger = DraftLedger(1, 10_000)
    position = 1
    while ledger.credit_rows >= 1:
        ledger.offer(chain(position, 1, 1, 1, 1, 1, 1, turn=ledger.turn))
        ledger.committed(0)
        position += 1
    assert ledger.offer(chain(position, *([2] * 32), turn=ledger.turn)) is None
    for _ in range(8):
        ledger.committed(0)
        position += 1
    frame = chain(position, *([2] * 32), turn=ledger.turn)
    assert ledger.offer(frame) == chain(position, 2, turn=ledger.turn)
    assert ledger.offer(frame) == chain(position, 2, turn=ledger.turn)  # again: what is known costs nothing
    assert ledger.committed(2) is True
    assert ledger.offer(chain(position + 1, *([2] * 31), turn=ledger.turn)) == chain(
        position + 1, *([2] * 24), turn=ledger.turn
    )


def test_side_rows_are_left_out_where_credit_is_short() -> None:
    ledger = DraftLedger(1, 10_000)
    assert ledger.offer(chain(1, *([3] * 126))) is not None
    assert ledger.committed(0) is False
    sides = Draft(0, 0, ledger.turn, 2, (1, 2, 1, 4, 5), (1, 1, 5, 6, 7))
    assert ledger.offer(sides) == chain(2, 1, 1, turn=ledger.turn)
