"""The frames of the device's link: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.wire import (
    FINISHES,
    CommittedDecoder,
    CommittedEncoder,
    CommittedFrame,
    DraftDecoder,
    DraftEncoder,
    DraftFrame,
    chain_frame,
)

MAX_ROWS = 5000
VOCABULARIES = st.sampled_from((4096, 1 << 16, 1 << 17))


@st.composite
def draft_frames(draw: st.DrawFn) -> list[DraftFrame]:
    frames, turn = [], 0
    for _ in range(draw(st.integers(1, 8))):
        turn += draw(st.sampled_from((0, 0, 1, 200)))
        base = draw(st.integers(max(turn, 1), turn + 300))
        ids = tuple(draw(st.lists(st.integers(0, 4095), min_size=1, max_size=80)))
        parents = list(range(base - 1, base - 1 + len(ids)))
        for _ in range(draw(st.integers(0, 3))):
            last = base - 1 + len(parents)
            chain_goes_on = len(parents) == len(ids)
            parents.append(draw(st.integers(base - 1, last - 1 if chain_goes_on else last)))
        sides = (7,) * (len(parents) - len(ids))
        frames.append(DraftFrame(turn, base, ids + sides, tuple(parents)))
    return frames


@given(draft_frames(), VOCABULARIES)
def test_drafts_come_out_as_they_went_in(frames: list[DraftFrame], vocab_size: int) -> None:
    encoder, decoder = DraftEncoder(vocab_size), DraftDecoder(vocab_size, MAX_ROWS)
    assert [decoder.decode(encoder.encode(frame)) for frame in frames] == frames


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4000), st.lists(st.integers(0, 4095), max_size=70), st.sampled_from(FINISHES)
        ),
        max_size=8,
    ),
    VOCABULARIES,
)
def test_committed_ids_come_out_as_they_went_in(
    rows: list[tuple[int, list[int], str]], vocab_size: int
) -> None:
    encoder, decoder = CommittedEncoder(vocab_size), CommittedDecoder(vocab_size)
    frames = [CommittedFrame(position, tuple(ids), finish) for position, ids, finish in rows]
    assert [decoder.decode(encoder.encode(frame)) for frame in frames] == frames


@given(st.binary(max_size=40))
def test_garbage_is_a_protocol_error_or_a_frame_within_bounds(data: bytes) -> None:
    try:
        frame = DraftDecoder(4096, MAX_ROWS).decode(data)
    except ProtocolError:
        return
    assert frame.ids
    assert max(frame.ids) < 4096
    assert frame.base_row + frame.chain_length <= MAX_ROWS


def test_every_truncation_is_refused_and_changes_nothing() -> None:
    frame = DraftFrame(9, 10, (1, 2, 3), (9, 10, 9))
    data, decoder = DraftEncoder(4096).encode(frame), DraftDecoder(4096, MAX_ROWS)
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            decoder.decode(data[:end])
    assert decoder.decode(data) == frame


def test_a_run_costs_one_byte_over_its_ids_and_a_restart_three() -> None:
    encoder = DraftEncoder(4096)
    encoder.encode(chain_frame(100, 101, (1,)))
    assert len(encoder.encode(chain_frame(100, 102, (1,)))) == 3
    assert len(encoder.encode(chain_frame(103, 104, (1,)))) == 5


@given(st.integers(0, 255), st.booleans())
def test_a_load_takes_two_bytes_and_changes_nothing_else(load: int, is_first: bool) -> None:
    encoder, decoder = CommittedEncoder(4096), CommittedDecoder(4096)
    if not is_first:
        decoder.decode(encoder.encode(CommittedFrame(7, (1, 2))))
    data = encoder.encode(CommittedFrame(0, (), load=load / 255))
    assert len(data) == 2
    assert decoder.decode(data) == CommittedFrame(0 if is_first else 9, (), load=load / 255)
    assert decoder.decode(encoder.encode(CommittedFrame(9, (3,)))) == CommittedFrame(9, (3,))
    with pytest.raises(ProtocolError):
        decoder.decode(data + b"x")
