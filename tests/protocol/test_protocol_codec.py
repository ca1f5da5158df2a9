"""Every message survives the trip; no bytes make the decoder raise anything but ProtocolError, or use much memory."""

from __future__ import annotations

import contextlib
import tracemalloc
from dataclasses import fields
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_runtime.core import SamplingParams, Token, TokenLogprob
from edge_runtime.errors import ProtocolError, VersionError
from edge_runtime.protocol import codec, messages
from edge_runtime.protocol.expert_messages import ExpertShare
from edge_runtime.protocol.messages import (
    MAX_CONTROL_BYTES,
    MAX_STRING_BYTES,
    MESSAGE_TAGS,
    PROTOCOL_VERSION,
    Feed,
    FrameRows,
    Heartbeat,
    Message,
    OpenSession,
    PeerEntry,
    PeerLeaseBody,
    Ping,
    Pong,
    Refused,
    Tokens,
    Welcome,
)
from edge_runtime.transport.base import MAX_FRAMES

INTS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PAIRS = st.lists(st.tuples(INTS, FLOATS), max_size=3).map(tuple)
LOGPROBS = st.builds(TokenLogprob, logprob=FLOATS, top=PAIRS)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    bool: st.booleans(),
    float: FLOATS,
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    tuple[int, ...]: st.lists(INTS, max_size=20).map(tuple),
    tuple[str, ...]: st.lists(st.text(max_size=8), max_size=4).map(tuple),
    SamplingParams: st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 2**63),
        logit_bias=PAIRS,
        seed=st.integers(0, 2**64 - 1),
        top_logprobs=st.integers(-1, 20),
    ),
    tuple[Token, ...]: st.lists(
        st.builds(Token, INTS, INTS, st.none() | LOGPROBS, st.sampled_from(["", "stop", "length"])),
        max_size=4,
    ).map(tuple),
    tuple[PeerEntry, ...]: st.lists(
        st.builds(PeerEntry, st.text(max_size=8), st.binary(max_size=32), st.text(max_size=8)), max_size=3
    ).map(tuple),
    tuple[ExpertShare, ...]: st.lists(
        st.builds(ExpertShare, st.text(max_size=8), INTS, st.binary(max_size=16)), max_size=3
    ).map(tuple),
}


def of_class(cls: type[Message]) -> st.SearchStrategy[Message]:
    hints = get_type_hints(cls)
    return st.builds(cls, *[BY_TYPE[hints[f.name]] for f in fields(cls)])


BY_TYPE[tuple[FrameRows, ...]] = st.lists(of_class(FrameRows), max_size=3).map(tuple)
BY_TYPE[tuple[Tokens, ...]] = st.lists(of_class(Tokens), max_size=3).map(tuple)


def any_message() -> st.SearchStrategy[Message]:
    return st.one_of([of_class(cls) for cls in MESSAGE_TAGS.values()])


def wire(*values: object) -> bytes:
    packed: bytes = msgpack.packb([PROTOCOL_VERSION, *values])
    return packed


@settings(max_examples=400, deadline=None)
@given(any_message())
def test_every_message_comes_back_equal(message: Message) -> None:
    decoded, payloads = codec.decode(codec.encode(message))
    assert decoded == message
    assert type(decoded) is type(message)
    assert payloads == []


@pytest.mark.parametrize("cls", MESSAGE_TAGS.values(), ids=lambda cls: cls.__name__)
def test_the_table_and_the_union_agree(cls: type[Message]) -> None:
    assert cls in messages.Message.__args__
    assert len(MESSAGE_TAGS) == len(messages.Message.__args__)


@settings(max_examples=400, deadline=None)
@given(any_message(), st.data())
def test_mutated_bytes_raise_only_protocol_errors(message: Message, data: st.DataObject) -> None:
    frame = bytearray(codec.encode_message(message))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for candidate in (bytes(frame), bytes(frame[:cut]), bytes(frame[cut:])):
        with contextlib.suppress(ProtocolError):
            codec.decode([candidate])


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x90")
@example(b"\xc1")
def test_random_bytes_raise_only_protocol_errors(frame: bytes) -> None:
    for candidate in (frame, b"\x92\x01" + frame, b"\x9a\x01\x2a" + frame):
        with contextlib.suppress(ProtocolError):
            codec.decode([candidate])


FRAME_ROWS_TAG = next(tag for tag, cls in MESSAGE_TAGS.items() if cls is FrameRows)


@pytest.mark.parametrize(
    "frame",
    [
        wire(99),
        wire(13, 1),
        wire(13, 1, 8, 0),
        wire(13, True, 8),
        wire(13, 1.0, 8),
        wire(13, None, 8),
        wire(13, "1", 8),
        wire(13, [], 8),
        wire(13, {}, 8),
        wire(13, msgpack.ExtType(5, b""), 8),
        wire(13, msgpack.Timestamp(0), 8),
        wire(11, "device", float("nan"), 1.0),
        wire(11, "device", float("inf"), 1.0),
        wire(11, "device", 5, 1.0),
        wire(11, b"device", 5.0, 1.0),
        wire(11, "d" * (MAX_STRING_BYTES + 1), 5.0, 1.0),
        wire(13, 1, 8) + b"\x00",
        wire(FRAME_ROWS_TAG, 1, 1, 1, 1, 1, [1, True], [1], False),
        wire(FRAME_ROWS_TAG, 1, 1, 1, 1, 1, [1, [2]], [1], False),
        wire(FRAME_ROWS_TAG, 1, 1, 1, 1, 1, 7, [1], False),
        msgpack.packb({"a": 1}),
        msgpack.packb([True, 13, 1, 8]),
    ],
)
def test_malformed_messages_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode([frame])


def test_the_invariants_of_nested_values_hold_for_received_ones() -> None:
    good = OpenSession(1, 1, 3, 3, 9, (2,), SamplingParams(), "sampler")
    values = msgpack.unpackb(codec.encode_message(good))
    values[8][2] = 0.0  # top_p
    with pytest.raises(ProtocolError, match="top_p"):
        codec.decode([msgpack.packb(values)])


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, 2**40])
def test_another_version_is_refused_in_words(version: int) -> None:
    frame = msgpack.packb([version, 13, 1, 8])
    with pytest.raises(VersionError, match=f"protocol {version}") as caught:
        codec.decode([frame])
    assert "update edge-runtime" in caught.value.hint


def test_an_unknown_tag_of_another_version_is_a_version_error() -> None:
    with pytest.raises(VersionError):
        codec.decode([msgpack.packb([7, 200, {}])])


def test_a_refusal_can_be_read_in_every_version() -> None:
    frame = msgpack.packb([9, 3, "protocol_version", "too old", "update"])
    assert codec.decode([frame])[0] == Refused("protocol_version", "too old", "update")


@pytest.mark.parametrize(
    "message",
    [
        Ping(True, 1),
        Ping(2**64, 1),
        Ping(1.5, 1),  # type: ignore[arg-type]
        Welcome("d", float("inf"), 1.0),
        Welcome("\ud800", 1.0, 1.0),
        Welcome("é" * (MAX_STRING_BYTES - 1), 1.0, 1.0),
        Feed(1, 1, 0, (1, True)),
        Feed(1, 1, 0, [1]),  # type: ignore[arg-type]
        Tokens(1, 1, 0, (None,)),  # type: ignore[arg-type]
        PeerLeaseBody(1, "d", (PeerEntry("a", bytearray(32), ""),)),  # type: ignore[arg-type]
        "not a message",
    ],
)
def test_values_that_may_not_travel_are_refused_at_the_sender(message: Message) -> None:
    with pytest.raises(ProtocolError):
        codec.encode(message)


def test_a_whole_number_may_be_written_where_a_float_belongs() -> None:
    assert codec.decode(codec.encode(Welcome("d", 1, 3)))[0] == Welcome("d", 1.0, 3.0)


def test_payload_frames_travel_untouched() -> None:
    rows = bytearray(b"rows")
    frames = codec.encode(Pong(1), [rows, memoryview(b"more")])
    assert frames[1] is rows
    _message, payloads = codec.decode(frames)
    assert [bytes(p) for p in payloads] == [b"rows", b"more"]
    with pytest.raises(ProtocolError):
        codec.encode(Pong(1), [b""] * MAX_FRAMES)
    with pytest.raises(ProtocolError):
        codec.decode([codec.encode_message(Pong(1)), *[b""] * MAX_FRAMES])
    with pytest.raises(ProtocolError):
        codec.decode([])


ONE_MIB = 1 << 20
AMPLIFIERS = {
    "empty maps": b"\x97\x01\x0d" + b"\x80" * ONE_MIB,
    "a list of empty maps": b"\x96\x01\x29\x01\x01\x00"
    + b"\xdd"
    + ONE_MIB.to_bytes(4, "big")
    + b"\x80" * ONE_MIB,
    "a list of empty lists": b"\x96\x01\x29\x01\x01\x00"
    + b"\xdd"
    + ONE_MIB.to_bytes(4, "big")
    + b"\x90" * ONE_MIB,
    "nested huge lists": b"\x96\x01\x29\x01\x01\x00"
    + (b"\xdd" + ONE_MIB.to_bytes(4, "big")) * (ONE_MIB // 5),
    "a huge length and no items": b"\x96\x01\x29\x01\x01\x00\xdd\x7f\xff\xff\xff",
    "a huge string length": b"\x94\x01\x0d\xdb\x7f\xff\xff\xff" + b"a" * 100,
    "extensions": b"\x96\x01\x29\x01\x01\x00" + b"\xdd\x00\x04\x00\x00" + b"\xc7\x00\x05" * (ONE_MIB // 4),
}


@pytest.mark.parametrize("frame", AMPLIFIERS.values(), ids=AMPLIFIERS.keys())
def test_a_small_frame_does_not_unfold_into_a_large_object(frame: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            codec.decode([frame])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * len(frame) + (64 << 10)


def test_a_frame_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolError):
        codec.decode([bytes(MAX_CONTROL_BYTES + 1)])
    with pytest.raises(ProtocolError):
        codec.encode(Feed(1, 1, 0, (0,) * (messages.MAX_ITEMS + 1)))
    long = Feed(1, 1, 0, tuple(range(100_000)))
    assert codec.decode(codec.encode(long))[0] == long


def test_nil_where_nothing_is_optional_is_refused() -> None:
    with pytest.raises(ProtocolError):
        codec.decode([wire(12, 1, 2, 3, None, 5)])
    assert codec.decode(codec.encode(Heartbeat(1, 2, 3, 4, 5)))[0] == Heartbeat(1, 2, 3, 4, 5)
