"""Whose prompt goes on: nobody waits for ever, and most do not wait long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.prompt_turns import PromptTurns
from edge_runtime.core import SessionId


def ends(prompts: list[int], *, newcomer_chunks: int = 0, until: int = 10_000) -> dict[SessionId, int]:
    """After how many chunks each prompt of so many chunks was through. A newcomer of so many comes with every chunk."""
    left = {SessionId(number): chunks for number, chunks in enumerate(prompts)}
    turns, found = PromptTurns(), {}
    for session in left:
        turns.add(session)
    for count in range(1, until):
        session = turns.peek(left.__getitem__)
        turns.took()
        left[session] -= 1
        if not left[session]:
            turns.discard(session)
            found[session] = count
        if newcomer_chunks:
            left[SessionId(1000 + count)] = newcomer_chunks
            turns.add(SessionId(1000 + count))
        if not turns:
            break
    return found


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_every_chunk_is_issued_once(prompts: list[int]) -> None:
    found = ends(prompts)
    assert len(found) == len(prompts)
    assert max(found.values()) == sum(prompts)


@given(st.integers(2, 12), st.integers(2, 8))
def test_a_burst_of_equal_prompts_ends_one_after_the_other(count: int, chunks: int) -> None:
    assert sorted(ends([chunks] * count).values()) == [chunks * (n + 1) for n in range(count)]


@given(st.integers(1, 20), st.integers(1, 3))
def test_the_first_is_through_in_twice_its_chunks_however_many_short_ones_come(
    chunks: int, short: int
) -> None:
    assert ends([chunks], newcomer_chunks=short, until=100)[SessionId(0)] <= 2 * chunks


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    assert ends([64, 64, 64, 2])[SessionId(3)] <= 4


def test_an_equal_prompt_waits_for_the_first_instead_of_both_ending_late() -> None:
    assert ends([8, 8]) == {SessionId(0): 8, SessionId(1): 16}
