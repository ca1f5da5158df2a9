"""Small lists in one ZeroMQ part: what is packed is unpacked, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ProtocolError
from edge_runtime.transport.base import MAX_FRAMES
from edge_runtime.transport.channel import CREDIT, DATA
from edge_runtime.transport.zeromq.delivery import IN_ONE, IN_ONE_BYTES, packed, unpacked

FRAMES = st.lists(st.binary(max_size=40), min_size=1, max_size=MAX_FRAMES)


@given(FRAMES)
def test_a_small_list_comes_back_out_of_its_one_part(frames: list[bytes]) -> None:
    (part,) = packed([DATA, *frames])
    assert [bytes(frame) for frame in unpacked(memoryview(bytes(part)))] == frames


@given(st.binary(max_size=60))
def test_whatever_comes_is_a_list_or_a_breach_of_the_protocol(body: bytes) -> None:
    part = IN_ONE + body
    try:
        frames = unpacked(memoryview(part))
    except ProtocolError:
        return
    assert packed([DATA, *frames]) == [part]


def test_large_lists_and_other_kinds_keep_a_part_for_each_frame() -> None:
    large = [DATA, b"message", bytes(IN_ONE_BYTES)]
    assert packed(large) == large
    assert packed([CREDIT, bytes(12)]) == [CREDIT, bytes(12)]
    assert len(packed([DATA, bytes(IN_ONE_BYTES)])) == 1


@pytest.mark.parametrize("part", [b"L", b"L\x00", b"L\x11" + bytes(68), b"L\x01\x00\x00\x00\x02x"])
def test_lengths_that_are_not_the_parts_are_refused(part: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpacked(memoryview(part))
