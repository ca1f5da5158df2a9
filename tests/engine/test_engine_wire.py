"""Wire formats: rounding twice is rounding once, frames carry what was rounded, and what does not fit is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engine.wire import FP16, FP32, INT8, WIRES, check_wire, packed, rounded, row_bytes, unpacked
from edge_runtime.errors import EngineError


@st.composite
def row_batches(draw: st.DrawFn) -> np.ndarray:
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 32, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = rng.standard_normal((rows, width), np.float32)
    values *= np.float32(10.0) ** np.float32(draw(st.integers(-30, 4)))
    values[rng.random((rows, width)) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return values


@settings(max_examples=300, deadline=None)
@given(row_batches(), st.sampled_from(WIRES))
def test_rounding_again_changes_nothing_and_frames_are_exact(rows: np.ndarray, wire: str) -> None:
    once = rounded(rows, wire)
    assert once.dtype == np.float32
    np.testing.assert_array_equal(rounded(once, wire), once)
    frame = packed(once, wire)
    assert frame.nbytes == len(rows) * row_bytes(wire, rows.shape[1])
    back = unpacked(frame, wire, len(rows), rows.shape[1])
    assert back is not None
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, once)


@settings(max_examples=100, deadline=None)
@given(row_batches(), st.sampled_from(WIRES))
def test_a_row_does_not_depend_on_its_neighbours(rows: np.ndarray, wire: str) -> None:
    alone = np.concatenate([rounded(rows[r : r + 1], wire) for r in range(len(rows))])
    np.testing.assert_array_equal(rounded(rows, wire), alone)


@settings(max_examples=100, deadline=None)
@given(row_batches())
def test_int8_is_off_by_half_a_step_at_most(rows: np.ndarray) -> None:
    step = np.abs(rows).max(axis=1, keepdims=True) / 127 * 1.001 + 1e-30
    assert (np.abs(rounded(rows, INT8) - rows) <= step / 2).all()


def test_fp32_is_neither_copied_nor_changed() -> None:
    rows = np.ones((2, 64), np.float32)
    assert rounded(rows, FP32) is rows
    assert np.shares_memory(np.frombuffer(packed(rows, FP32), np.float32), rows)


@pytest.mark.parametrize(("wire", "value"), [(FP16, 65520.0), (FP16, np.inf), (FP16, np.nan), (INT8, np.inf)])
def test_what_does_not_fit_is_an_error_that_says_what_to_do(wire: str, value: float) -> None:
    rows = np.zeros((2, 8), np.float32)
    rows[1, 3] = value
    with pytest.raises(EngineError, match="--wire fp32") as caught:
        rounded(rows, wire)
    assert caught.value.code == "wire_overflow"
    assert rounded(np.full((1, 1), 65504, np.float32), FP16)[0, 0] == 65504


@pytest.mark.parametrize("wire", WIRES)
def test_a_frame_of_another_size_is_no_frame(wire: str) -> None:
    frame = packed(np.ones((2, 8), np.float32), wire)
    assert unpacked(frame, wire, 2, 9) is None
    assert unpacked(frame, wire, 1, 8) is None


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(EngineError, match="no wire format"):
        check_wire("fp8")
