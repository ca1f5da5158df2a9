"""The short cut for rows and ids says what the schema says, of whatever is written and whatever arrives."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.core import Token, TokenLogprob
from edge_runtime.errors import ProtocolError
from edge_runtime.protocol import codec, hot_messages
from edge_runtime.protocol.messages import CloseSession, FrameRows, Message, StepRows, StepTokens, Tokens

INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
LISTS = st.lists(INTEGERS, max_size=80).map(tuple)
FRAMES = st.builds(FrameRows, *[INTEGERS] * 5, LISTS, LISTS, st.booleans())
TOKEN = st.builds(
    Token, INTEGERS, INTEGERS, st.none() | st.builds(TokenLogprob, st.floats(-9, 0)), st.text(max_size=8)
)
TOKENS = st.builds(Tokens, INTEGERS, INTEGERS, INTEGERS, st.lists(TOKEN, max_size=5).map(tuple))
STEPS = st.builds(StepRows, st.lists(FRAMES, max_size=4).map(tuple)) | st.builds(
    StepTokens, st.lists(TOKENS, max_size=4).map(tuple)
)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


def outcome(read: Any, what: object) -> tuple[str, object]:
    try:
        return "read", read(what)
    except ProtocolError as problem:
        return type(problem).__name__, problem.message


@given(FRAMES | TOKENS | STEPS)
def test_both_ways_write_and_read_the_same(message: Message) -> None:
    frame = codec.encode_by_schema(message)
    assert codec.encode_message(message) == frame
    assert codec.decode_message(frame) == codec.decode_by_schema(frame) == message


@given(FRAMES | TOKENS | STEPS, st.integers(0, 9), PLAIN)
@example(FrameRows(1, 1, 0, 1, 0, (-1,), (5,), False), 0, True)
@example(FrameRows(1, 1, 0, 1, 0, (-1,), (5,), False), 0, 2)
@example(Tokens(1, 1, 0, (Token(3, 4),)), 5, [[3, 4, None]])
def test_a_value_of_another_type_is_refused_alike(message: Message, index: int, value: object) -> None:
    values = msgpack.unpackb(codec.encode_by_schema(message))
    values[index % len(values)] = value
    frame = msgpack.packb(values)
    assert outcome(codec.decode_message, frame) == outcome(codec.decode_by_schema, frame)


@given(FRAMES | TOKENS | STEPS, st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_other_bytes_are_refused_alike(message: Message, at: int, other: bytes) -> None:
    whole = codec.encode_by_schema(message)
    at %= len(whole) + 1
    for frame in (whole[:at], whole[:at] + other + whole[at + len(other) :], whole + other):
        assert outcome(codec.decode_message, frame) == outcome(codec.decode_by_schema, frame)


@given(st.binary(max_size=60))
@example(b"\x91" * 2000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xd6\xff\x00\x00\x00\x00")
@example(b"\x81\x91\x01\x02")
def test_no_bytes_make_the_short_cut_fail(frame: bytes) -> None:
    assert outcome(codec.decode_message, frame) == outcome(codec.decode_by_schema, memoryview(frame))


@pytest.mark.parametrize(
    "message",
    [
        FrameRows(1 << 64, 1, 0, 1, 0, (-1,), (5,), False),
        FrameRows(1, 1, 0, 1, 0, (-1,), (5.0,), False),  # type: ignore[arg-type]
        FrameRows(1, 1, 0, 1, 0, [-1], (5,), False),  # type: ignore[arg-type]
        FrameRows(True, 1, 0, 1, 0, (-1,), (5,), False),
        FrameRows(1, 1, 0, 1, 0, (-1,), (5,), 0),  # type: ignore[arg-type]
        Tokens(1, 1, 0, (Token(1, True),)),
        Tokens(1, 1, 0, ((1, 2, None, ""),)),  # type: ignore[arg-type]
        Tokens(1, 1, 0, [Token(1, 2)]),  # type: ignore[arg-type]
        Tokens(1, 1, 0, (Token(1, 2, finish="\ud800"),)),
        StepRows([FrameRows(1, 1, 0, 1, 0, (-1,), (5,), False)]),  # type: ignore[arg-type]
        StepRows((Tokens(1, 1, 0, ()),)),  # type: ignore[arg-type]
        StepTokens((Tokens(1, 1, 0, (Token(1, True),)),)),
    ],
)
def test_what_may_not_travel_is_refused_alike(message: Message) -> None:
    written = outcome(codec.encode_message, message)
    assert written == outcome(codec.encode_by_schema, message)
    assert written[0] == "ProtocolError"


def test_the_short_cut_is_taken_for_what_decoding_sends_and_for_nothing_large() -> None:
    rows = FrameRows(77, 3, 0, 500, 600, (599,), (31_999,), False)
    ids = Tokens(77, 3, 0, (Token(601, 5), Token(602, 6, finish="stop")))
    for message in (rows, ids, StepRows((rows, rows)), StepTokens((ids, ids))):
        frame = hot_messages.encoded(message)
        assert frame is not None
        assert hot_messages.decoded(memoryview(frame)) == message
    prompt = FrameRows(1, 1, 0, 1, 0, tuple(range(-1, 4095)), (31_999,) * 4096, False)
    assert hot_messages.encoded(prompt) is None
    assert hot_messages.decoded(codec.encode_by_schema(prompt)) is None
    assert hot_messages.encoded(CloseSession(1, 1)) is None
