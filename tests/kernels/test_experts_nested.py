"""Experts in two bit planes: both are the int4 experts bit for bit, the first alone equals its reference."""

from __future__ import annotations

import edge_kernels
import numpy as np
import pytest
from edge_kernels import reference
from edge_kernels.experts import PARTS, ExpertWeights, run_experts
from edge_kernels.nested import (
    MIDDLE,
    NestedMatrix,
    dequantize_nested,
    nest,
    nested_scales,
    quantize_nested,
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
    """The same experts as nested4, as nested2 (the first plane of them) and as int4."""
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
            planes = nest(codes.data, codes.scales)
            nested |= {part: planes.high, f"{part}_scales": planes.scales, f"{part}_low": planes.low}
            blocks = codes.scales.shape[1]
            plain |= {part: codes.data, f"{part}_scales": nested_scales(planes)[:, :blocks]}
        nested_arrays.append(nested)
        int4_arrays.append(plain)
    kinds = ("", "_scales", "_low")
    full = packed("nested4", nested_arrays, [p + k for k in kinds for p in PARTS], hidden, intermediate)
    prefix = {name: at for name, at in full.offsets.items() if not name.endswith("_low")}
    start = ExpertWeights(full.buffer, "nested2", experts, hidden, intermediate, full.stride_bytes, prefix)
    int4 = packed("int4", int4_arrays, [p + k for k in kinds[:2] for p in PARTS], hidden, intermediate)
    return {"nested4": full, "nested2": start, "int4": int4}


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
def test_both_planes_are_the_int4_experts_bit_for_bit(
    isa: str, hidden: int, intermediate: int, rows: int, seed: int
) -> None:
    ways = both_ways(3, hidden, intermediate, seed)
    x, ids, gates = make_rows(ways["int4"], rows, seed=seed)
    nested = run_experts(x, ids, gates, ways["nested4"], activation="silu")
    plain = run_experts(x, ids, gates, ways["int4"], activation="silu")
    np.testing.assert_array_equal(nested.view(np.uint32), plain.view(np.uint32))


@given(hidden=SIZES, intermediate=SIZES, rows=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_plane_equals_its_reference(
    isa: str, hidden: int, intermediate: int, rows: int, seed: int
) -> None:
    weights = both_ways(3, hidden, intermediate, seed)["nested2"]
    x, ids, gates = make_rows(weights, rows, seed=seed)
    got = run_experts(x, ids, gates, weights, activation="silu")
    expected = reference.run_experts(x, ids, gates, weights, activation="silu")
    # An inner value's last bit may move its int8 code by one: a step of the block's largest / 127.
    steps = np.stack([largest_terms(x[r], ids[r], gates[r], weights) for r in range(rows)]) / 127
    assert (np.abs(got - expected) <= 2 * steps + 1e-6).all()


@given(format=st.sampled_from(("nested2", "nested4")), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_bits_in_any_batch(isa: str, format: str, data: st.DataObject) -> None:
    weights = both_ways(4, 200, 130, 0)[format]
    x, ids, gates = make_rows(weights, 30)
    whole = run_experts(x, ids, gates, weights, activation="silu")
    chosen = np.array(data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=80)))
    threads = data.draw(st.integers(1, 3))
    part = run_experts(x[chosen], ids[chosen], gates[chosen], weights, activation="silu", threads=threads)
    np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize("format", ["nested2", "nested4"])
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


def test_a_width_of_bits_that_is_not_there_is_refused() -> None:
    empty = NestedMatrix(*(np.zeros((1, 1, size), np.uint8) for size in (32, 32, 8)))
    with pytest.raises(ValueError, match="2 or 4 bits, not 3"):
        dequantize_nested(empty, 3, 128)
