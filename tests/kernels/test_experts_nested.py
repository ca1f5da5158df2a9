"""Experts in bit planes: two are the int4 experts bit for bit, the first alone and all three equal their reference."""

from __future__ import annotations

from dataclasses import replace

import edge_kernels
import numpy as np
import pytest
from edge_kernels import reference
from edge_kernels.error_feedback import ErrorFeedback, quantize_with_feedback
from edge_kernels.experts import PARTS, ExpertWeights, run_experts
from edge_kernels.nested import (
    MIDDLE,
    NestedMatrix,
    dequantize_nested,
    nest,
    nested_scales,
    quantize_nested,
    refine,
)
from edge_kernels.quantization import QuantizedMatrix, dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.test_experts import largest_terms, make_rows

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]
SIZES = st.integers(1, 300)


def both_ways(experts: int, hidden: int, intermediate: int, seed: int) -> dict[str, ExpertWeights]:
    """The same experts as nested8, as nested4 and nested2 (the first planes of them) and as int4."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    nested_arrays: list[Arrays] = []
    int4_arrays: list[Arrays] = []
    for _ in range(experts):
        nested: Arrays = {}
        plain: Arrays = {}
        for part in PARTS:
            w = (rng.normal(size=shapes[part]) * 0.2).astype(np.float32)
            codes = quantize(w, "int4", search=False)
            planes = refine(nest(codes.data, codes.scales), w)
            assert planes.fine is not None
            nested |= {part: planes.high, f"{part}_scales": planes.scales, f"{part}_low": planes.low}
            nested |= {f"{part}_fine": planes.fine}
            blocks = codes.scales.shape[1]
            plain |= {part: codes.data, f"{part}_scales": nested_scales(planes)[:, :blocks]}
        nested_arrays.append(nested)
        int4_arrays.append(plain)
    kinds = ("", "_scales", "_low", "_fine")
    full = packed("nested8", nested_arrays, [p + k for k in kinds for p in PARTS], hidden, intermediate)
    names = list(full.offsets)
    half = replace(full, format="nested4", offsets={name: full.offsets[name] for name in names[:9]})
    start = replace(full, format="nested2", offsets={name: full.offsets[name] for name in names[:6]})
    int4 = packed("int4", int4_arrays, [p + k for k in kinds[:2] for p in PARTS], hidden, intermediate)
    return {"nested8": full, "nested4": half, "nested2": start, "int4": int4}


def packed(
    format: str, experts: list[Arrays], names: list[str], hidden: int, intermediate: int
) -> ExpertWeights:
    offsets, stride = {}, 0
    for name in names:
        offsets[name] = stride
        stride += -(-experts[0][name].nbytes // 64) * 64
    buffer = np.full(len(experts) * stride, 255, np.uint8)
    for number, arrays in enumerate(experts):
        for name in names:
            data = np.frombuffer(arrays[name].tobytes(), np.uint8)
            start = number * stride + offsets[name]
            buffer[start : start + data.size] = data
    return ExpertWeights(buffer, format, len(experts), hidden, intermediate, stride, offsets)


@given(hidden=SIZES, intermediate=SIZES, rows=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_planes_are_the_int4_experts_bit_for_bit(
    isa: str, hidden: int, intermediate: int, rows: int, seed: int
) -> None:
    ways = both_ways(3, hidden, intermediate, seed)
    x, ids, gates = make_rows(ways["int4"], rows, seed=seed)
    nested = run_experts(x, ids, gates, ways["nested4"], activation="silu")
    plain = run_experts(x, ids, gates, ways["int4"], activation="silu")
    np.testing.assert_array_equal(nested.view(np.uint32), plain.view(np.uint32))


@given(
    hidden=SIZES,
    intermediate=SIZES,
    rows=st.integers(1, 5),
    format=st.sampled_from(("nested2", "nested8")),
    seed=st.integers(0, 99),
)
@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_planes_equal_their_reference(
    isa: str, hidden: int, intermediate: int, rows: int, format: str, seed: int
) -> None:
    weights = both_ways(3, hidden, intermediate, seed)[format]
    x, ids, gates = make_rows(weights, rows, seed=seed)
    got = run_experts(x, ids, gates, weights, activation="silu")
    expected = reference.run_experts(x, ids, gates, weights, activation="silu")
    # An inner value's last bit may move its int8 code by one: a step of the block's largest / 127.
    steps = np.stack([largest_terms(x[r], ids[r], gates[r], weights) for r in range(rows)]) / 127
    assert (np.abs(got - expected) <= 2 * steps + 1e-6).all()


@given(format=st.sampled_from(("nested2", "nested4", "nested8")), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_bits_in_any_batch(isa: str, format: str, data: st.DataObject) -> None:
    weights = both_ways(4, 200, 130, 0)[format]
    x, ids, gates = make_rows(weights, 30)
    whole = run_experts(x, ids, gates, weights, activation="silu")
    chosen = np.array(data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=80)))
    threads = data.draw(st.integers(1, 3))
    part = run_experts(x[chosen], ids[chosen], gates[chosen], weights, activation="silu", threads=threads)
    np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize("format", ["nested2", "nested4", "nested8"])
def test_every_instruction_set_gives_the_same_bits(format: str) -> None:
    weights = both_ways(4, 300, 170, 1)[format]
    x, ids, gates = make_rows(weights, 7)
    results = []
    for name in edge_kernels.available_isas():
        edge_kernels.set_isa(name)
        results.append(run_experts(x, ids, gates, weights, activation="silu"))
    edge_kernels.set_isa(edge_kernels.available_isas()[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@given(rows=st.integers(1, 6), columns=st.integers(1, 400), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_planes_hold_the_int4_codes(rows: int, columns: int, seed: int) -> None:
    """4 bits: the int4 values, but for scales of eight bits. 2 bits: nowhere further off than two codes."""
    w = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    nested, plain = quantize_nested(w), quantize(w, "int4")
    scales = nested_scales(nested)[:, : plain.scales.shape[1]]
    np.testing.assert_allclose(scales, plain.scales, rtol=2.0**-8)
    full = dequantize_nested(nested, 4, columns)
    np.testing.assert_array_equal(full, dequantize(QuantizedMatrix(plain.data, scales), "int4", columns))
    by_column = np.abs(scales).repeat(32, -1)[:, :columns]
    start = dequantize_nested(nested, 2, columns)
    assert (np.abs(start - full) <= (4 - 1 - MIDDLE) * by_column * (1 + 1e-6)).all()


@given(rows=st.integers(1, 6), columns=st.integers(1, 400), seed=st.integers(0, 99), has_inputs=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_third_plane_keeps_the_two_and_comes_near_to_the_weights(
    rows: int, columns: int, seed: int, has_inputs: bool
) -> None:
    """It moves a weight by at most a step of the codes; without inputs to go by, to the nearest seventh of one."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns)).astype(np.float32)
    feedback = None
    if has_inputs:
        x = rng.normal(size=(40, columns)).astype(np.float32)
        feedback = ErrorFeedback.of(x, np.square(x).mean(axis=0) + np.float32(1e-6))
    two = quantize_nested(w)
    three = refine(two, w, feedback)
    assert (two.bits, three.bits) == (4, 8)
    for name in ("high", "low", "scales"):
        np.testing.assert_array_equal(getattr(three, name), getattr(two, name))
    steps = np.abs(nested_scales(two)).repeat(32, -1)[:, :columns]
    at_4, at_8 = (dequantize_nested(three, bits, columns) for bits in (4, 8))
    assert (np.abs(at_8 - at_4) <= steps * (8 / 7 + 1e-6)).all()
    if feedback is None:
        in_reach = np.abs(w - at_4) <= steps
        assert (np.abs(at_8 - w) <= steps * (1 / 14 + 1e-5))[in_reach].all()
        assert (np.abs(at_8 - w) <= np.abs(at_4 - w) + steps * 1e-5).all()
        np.testing.assert_array_equal(at_8, dequantize_nested(quantize_nested(w, bits=8), 8, columns))


def test_a_third_plane_makes_up_for_its_errors_in_the_columns_behind() -> None:
    """Inputs that go together: the product with them is nearer than without a look at them."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 160)) + 0.1 * rng.normal(size=(200, 160))).astype(
        np.float32
    )
    w = rng.normal(size=(20, 160)).astype(np.float32)
    feedback = ErrorFeedback.of(x, np.square(x).mean(axis=0))
    quantized = quantize_with_feedback(w, feedback)
    two = nest(quantized.data, quantized.scales)

    def error(matrix: NestedMatrix, bits: int) -> float:
        return float(np.square(x @ (dequantize_nested(matrix, bits, 160) - w).T).mean())

    plain, fed = refine(two, w), refine(two, w, feedback)
    assert error(fed, 8) < error(plain, 8) / 2
    assert error(fed, 8) < error(two, 4) / 2


def test_a_width_of_bits_that_is_not_there_is_refused() -> None:
    empty = NestedMatrix(*(np.zeros((1, 1, size), np.uint8) for size in (32, 32, 8)))
    with pytest.raises(ValueError, match="2 or 4 bits, not 3"):
        dequantize_nested(empty, 3, 128)
    with pytest.raises(ValueError, match="2 or 4 bits, not 8"):
        dequantize_nested(empty, 8, 128)
