"""One message for a step says what a message for each of its sessions says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import COORDINATOR, Send
from edge_runtime.agent.step_messages import MAX_BUNDLE_BYTES, bundled, parted, parts, row_count
from edge_runtime.core import Token
from edge_runtime.protocol.messages import FrameRows, StepRows, StepTokens, Tokens

HIDDEN = 4


def frame(session: int, ids: tuple[int, ...]) -> FrameRows:
    return FrameRows(session, 1, 0, 1, 7, tuple(range(6, 6 + len(ids))), ids, False)


def rows_to(to: str, session: int, ids: tuple[int, ...], hidden: int = HIDDEN) -> Send:
    rows = np.random.default_rng(session).standard_normal((len(ids), hidden), np.float32)
    return Send(to, frame(session, ids), rows)


def ids_to(to: str, session: int) -> Send:
    return Send(to, Tokens(session, 1, 0, (Token(8, session),)))


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
RECEIVERS = st.sampled_from(["next", "first", COORDINATOR])
SENDS = st.lists(
    st.builds(rows_to, RECEIVERS, st.integers(0, 9), IDS) | st.builds(ids_to, RECEIVERS, st.integers(0, 9))
)


def plain(sends: list[Send]) -> list[tuple[object, object]]:
    return [(send.message, None if send.rows is None else send.rows.tobytes()) for send in sends]


def unpacked(sends: list[Send]) -> list[Send]:
    return [Send(send.to, *part) for send in sends for part in parted(send.message, send.rows)]


@given(SENDS)
def test_each_receiver_is_told_the_same_in_the_same_order(sends: list[Send]) -> None:
    found = unpacked(bundled(sends))
    for to in {send.to for send in sends}:
        for kind in (FrameRows, Tokens):
            theirs = [
                [s for s in each if s.to == to and isinstance(s.message, kind)] for each in (sends, found)
            ]
            assert plain(theirs[0]) == plain(theirs[1])


@given(SENDS)
def test_a_receiver_gets_one_message_of_a_kind_and_the_coordinator_is_last(sends: list[Send]) -> None:
    found = bundled(sends)
    kinds = [(send.to, isinstance(send.message, StepRows | FrameRows)) for send in found]
    assert len(kinds) == len(set(kinds))
    assert all(after.to == COORDINATOR for before, after in pairwise(found) if before.to == COORDINATOR)
    for send in found:
        assert row_count(send.message) == (0 if send.rows is None else len(send.rows))


def test_one_session_alone_is_not_wrapped() -> None:
    sends = [ids_to("first", 1), ids_to(COORDINATOR, 1), rows_to("next", 2, (5,))]
    assert {type(send.message) for send in bundled(sends)} == {Tokens, FrameRows}


def test_many_rows_go_in_several_messages() -> None:
    wide = MAX_BUNDLE_BYTES // 4 // 2  # two rows to a message
    sends = [rows_to("next", session, (session,), wide) for session in range(5)]
    found = bundled(sends)
    assert [len(parts(send.message)) for send in found] == [2, 2, 1]
    assert plain(unpacked(found)) == plain(sends)


def test_rows_that_do_not_fit_are_missing_in_every_part() -> None:
    message = StepRows((frame(1, (5,)), frame(2, (6, 7))))
    assert list(parted(message, None)) == [(frame(1, (5,)), None), (frame(2, (6, 7)), None)]
    assert row_count(message) == 3
    assert row_count(StepTokens(())) == 0
