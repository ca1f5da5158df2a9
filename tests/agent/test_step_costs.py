"""How many rows fit into a time, from what steps took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.step_costs import FEW_ROWS, MOST_LISTED, PROBE_STEPS, StepCosts

IN_BLOCKS = {
    1: 0.0256,
    2: 0.0271,
    3: 0.0392,
    4: 0.0369,
    5: 0.0504,
    6: 0.0508,
    7: 0.0597,
    8: 0.0620,
}  # as measured


def measured() -> StepCosts:
    costs = StepCosts()
    for _ in range(20):
        for rows, seconds in IN_BLOCKS.items():
            costs.took(rows, seconds)
    return costs


def test_nothing_fits_before_anything_was_measured() -> None:
    costs = StepCosts()
    costs.took(2, 0.01)  # says nothing of more rows
    assert not costs.is_known
    assert costs.rows_within(1.0) == 0


def test_four_rows_that_are_cheaper_than_three_are_taken_instead() -> None:
    costs = measured()
    assert costs.rows_within(0.0385) == 4
    assert costs.rows_within(0.0365) == 2
    assert costs.rows_within(0.051) == 6
    assert costs.rows_within(0.02) == 0


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    costs = measured()
    for _ in range(30):
        costs.took(4, 0.5)
    assert costs.rows_within(0.0385) == 2
    for _ in range(PROBE_STEPS):
        costs.took(6, IN_BLOCKS[6])
    assert costs.rows_within(0.0385) == 4
    costs.took(4, IN_BLOCKS[4])
    assert costs.rows_within(0.0385) == 4  # what was slow then is forgotten


def test_what_a_row_takes_is_measured_anew_after_many_small_steps() -> None:
    costs = StepCosts()
    costs.took(8, 0.8)
    assert costs.is_known
    for _ in range(PROBE_STEPS):
        costs.took(2, 0.03)
    assert not costs.is_known
    costs.took(8, 0.08)
    assert costs.row_seconds == 0.01


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), min_size=1, max_size=60),
    st.floats(1e-5, 4.0),
)
def test_what_is_said_to_fit_is_expected_to(steps: list[tuple[int, float]], seconds: float) -> None:
    costs = StepCosts()
    for rows, taken in steps:
        costs.took(rows, taken)
    rows = costs.rows_within(seconds)
    assert rows == 0 or rows > MOST_LISTED or costs.seconds(rows) <= seconds * (1 + 1e-9)
    assert costs.is_known == any(rows >= FEW_ROWS for rows, _ in steps)
