"""How many drafts are sent, from measured times and verdicts; where a text ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import CapacityError
from edge_runtime.speculative.verifiers.pace import MAX_DRAFTS, Line, Pace
from edge_runtime.speculative.verifiers.progress import Ends, Progress


def paced(round_seconds: float, draft_seconds: float, token_seconds: float, chance: float) -> Pace:
    """Of a server that was measured well; drafts of source "s" come true with `chance`."""
    pace = Pace()
    for count in (1, 8, 4, 16, 2) * 20:
        pace.verified(count, round_seconds + count * draft_seconds)
    pace.stream_began(round_seconds)
    pace.streamed(100, 100 * token_seconds)
    for index in range(400):  # evenly spread
        pace.chances.judged("s", 0.8, is_right=int((index + 1) * chance) > int(index * chance))
    return pace


SURE = (0.8,) * 32


class TestChoose:
    def test_a_line_through_what_was_measured(self) -> None:
        line = Line(9.0)
        assert line.at(3) == 9.0
        for x in (0, 1, 5, 9, 2):
            line.add(x, 0.1 + 0.02 * x)
        assert line.at(20) == pytest.approx(0.5)
        line.add(3, 0.1 + 0.02 * 3)
        assert line.at(0) == pytest.approx(0.1)

    def test_good_drafts_of_a_slow_model_are_sent(self) -> None:
        pace = paced(round_seconds=0.1, draft_seconds=0.0, token_seconds=0.05, chance=0.95)
        assert pace.choose("s", SURE, is_streaming=False) > 8
        assert pace.choose("s", SURE[:3], is_streaming=False) == 3

    def test_bad_drafts_are_not(self) -> None:
        pace = paced(round_seconds=0.1, draft_seconds=0.0, token_seconds=0.05, chance=0.2)
        assert pace.choose("s", SURE, is_streaming=False) == 0

    def test_far_away_from_a_fast_model_the_stream_is_better(self) -> None:
        pace = paced(round_seconds=0.4, draft_seconds=0.0, token_seconds=0.01, chance=0.95)
        assert pace.choose("s", SURE, is_streaming=False) == 0

    def test_a_server_that_pays_for_each_draft_gets_fewer(self) -> None:
        free = paced(0.05, 0.0, 0.05, 0.9).choose("s", SURE, is_streaming=False)
        dear = paced(0.05, 0.02, 0.05, 0.9).choose("s", SURE, is_streaming=False)
        assert 0 < dear < free

    def test_a_slow_drafter_makes_fewer(self) -> None:
        pace = paced(0.1, 0.0, 0.05, 0.8)
        many = pace.wanted("s")
        pace.drafted("s", 10, 1.0)
        assert 1 <= pace.wanted("s") < many

    def test_leaving_a_stream_must_pay_for_beginning_anew(self) -> None:
        pace = paced(round_seconds=0.1, draft_seconds=0.0, token_seconds=0.045, chance=0.6)
        assert pace.choose("s", SURE, is_streaming=False) > 0
        assert pace.choose("s", SURE, is_streaming=True) == 0

    def test_a_second_window_needs_drafts_that_are_nearly_sure(self) -> None:
        assert paced(0.1, 0.0, 0.05, 0.99).ahead("s", (0.8,) * 65, 33) == 32
        assert paced(0.1, 0.0, 0.05, 0.99).ahead("s", (0.8,) * 33, 33) == 0
        assert paced(0.1, 0.0, 0.05, 0.9).ahead("s", (0.8,) * 65, 33) == 0
        assert paced(0.1, 0.0, 0.05, 0.9).ahead("s", (0.8,) * 10, 3) == 7

    def test_before_anything_is_known_good_drafts_are_tried(self) -> None:
        assert Pace().choose("s", (0.95,) * 16, is_streaming=False) > 0
        assert Pace().choose("s", (), is_streaming=False) == 0

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.floats(0, 1), max_size=50),
        st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), max_size=20),
        st.floats(0.0001, 10),
        st.booleans(),
    )
    def test_it_never_sends_more_than_there_are(
        self, chances: list[float], rounds: list[tuple[int, float]], token: float, streaming: bool
    ) -> None:
        pace = Pace()
        for count, seconds in rounds:
            pace.verified(count, seconds + 1e-6)
        pace.streamed(10, token)
        assert 0 <= pace.choose("s", chances, is_streaming=streaming) <= min(len(chances), MAX_DRAFTS)
        assert 1 <= pace.wanted("s") <= 2 * MAX_DRAFTS + 1
        assert 0 <= pace.ahead("s", chances, 5) <= min(max(0, len(chances) - 5), MAX_DRAFTS)


class TestProgress:
    def progress(self, **changes: object) -> Progress:
        options = {
            "max_tokens": 5,
            "max_context": None,
            "ends": Ends(frozenset({0, 1}), {7}),
            "ignore_end": False,
        }
        return Progress([3, 4], **{**options, **changes})  # type: ignore[arg-type]

    def test_the_limit_ends_it(self) -> None:
        progress = self.progress(max_tokens=2)
        progress.commit(5)
        assert (progress.room, progress.finish) == (1, "")
        progress.commit(5)
        assert (progress.room, progress.finish, progress.generated) == (0, "length", 2)

    def test_so_does_the_context(self) -> None:
        assert self.progress(max_context=4).room == 2
        with pytest.raises(CapacityError):
            self.progress(max_context=2)

    def test_known_ends_and_the_server_s_word_end_it(self) -> None:
        for token, ended in ((7, False), (5, True)):
            progress = self.progress()
            progress.commit(token, ended=ended)
            assert progress.finish == "stop"
        progress = self.progress(ignore_end=True)
        progress.commit(7, ended=True)
        assert progress.finish == ""

    def test_special_tokens_are_doubtful_until_something_is_learnt(self) -> None:
        progress = self.progress()
        assert progress.is_doubtful(0)
        assert not progress.is_doubtful(5)
        progress.learn(0, ends=False)
        progress.learn(1, ends=True)
        assert not progress.is_doubtful(0)
        assert not progress.is_doubtful(1)
        progress.commit(0)
        progress.commit(1)
        assert progress.finish == "stop"

    def test_nothing_is_drafted_after_what_may_end_the_text(self) -> None:
        assert self.progress().useful((5, 6, 0, 5)) == 3
        assert self.progress().useful((5, 7, 5)) == 2
        assert self.progress(ignore_end=True).useful((5, 7, 5)) == 3
