"""Experts from slice bytes: equal to the reference, and each row the same bits in any batch, threads and ISA."""

from __future__ import annotations

from collections.abc import Callable

import edge_kernels
import numpy as np
import pytest
from edge_kernels import reference
from edge_kernels.experts import PARTS, ExpertWeights, route, run_experts
from edge_kernels.quantization import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

F32 = NDArray[np.float32]
FORMATS = ("fp32", "int8", "int4")


def make_experts(
    format: str, *, experts: int = 4, hidden: int = 64, intermediate: int = 96, seed: int = 0
) -> ExpertWeights:
    """Experts as a bundle's slice holds them: an expert's parts together, one expert after another."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    packed: list[dict[str, NDArray[np.generic]]] = []
    for _ in range(experts):
        parts: dict[str, NDArray[np.generic]] = {}
        for part in PARTS:
            w = (rng.normal(size=shapes[part]) * 0.2).astype(np.float32)
            if format == "fp32":
                parts[part] = w
                continue
            quantized = quantize(w, format)
            parts[part], parts[f"{part}_scales"] = quantized.data, quantized.scales
        packed.append(parts)
    names = sorted(packed[0], key=lambda name: name.endswith("_scales"))
    offsets, stride = {}, 0
    for name in names:
        offsets[name] = stride
        stride += packed[0][name].nbytes
    stride = -(-stride // 64) * 64
    buffer = np.full(experts * stride, 255, np.uint8)
    for expert, parts in enumerate(packed):
        for name, array in parts.items():
            start = expert * stride + offsets[name]
            buffer[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return ExpertWeights(buffer, format, experts, hidden, intermediate, stride, offsets)


def make_rows(
    weights: ExpertWeights, rows: int, top_k: int = 2, seed: int = 1
) -> tuple[F32, NDArray[np.int32], F32]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, weights.num_experts)).astype(np.float32)
    ids, gates = route(logits, top_k=top_k, normalize=True, softmax_after=False)
    return rng.normal(size=(rows, weights.hidden)).astype(np.float32), ids, gates


def largest_terms(x: F32, ids: NDArray[np.int32], gates: F32, weights: ExpertWeights) -> F32:
    """For each output, the sum over experts of gate * largest |down| * largest |inner value|."""
    row, total = reference.int8_rounded(x), np.zeros(weights.hidden, np.float32)
    for expert, gate in zip(ids.tolist(), gates, strict=True):
        g, u = (weights.matrix(expert, part) @ row for part in ("gate", "up"))
        inner = np.abs(g / (1 + np.exp(-g)) * u).max()
        total += gate * np.abs(weights.matrix(expert, "down")).max(-1) * inner
    return total


@given(
    format=st.sampled_from(FORMATS),
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 150),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_reference(
    isa: str, format: str, hidden: int, intermediate: int, rows: int, seed: int
) -> None:
    weights = make_experts(format, hidden=hidden, intermediate=intermediate, seed=seed)
    x, ids, gates = make_rows(weights, rows, seed=seed + 1)
    got = run_experts(x, ids, gates, weights, activation="silu")
    expected = reference.run_experts(x, ids, gates, weights, activation="silu")
    if format == "fp32":
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    else:  # the last bit of an inner value may move its int8 code by one: a step of the block's largest / 127
        steps = np.stack([largest_terms(x[r], ids[r], gates[r], weights) for r in range(rows)]) / 127
        assert (np.abs(got - expected) <= 2 * steps + 1e-6).all()


@given(format=st.sampled_from(FORMATS), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_bits_in_any_batch(isa: str, format: str, data: st.DataObject) -> None:
    weights = make_experts(format, hidden=72, intermediate=40)
    x, ids, gates = make_rows(weights, 30)
    whole = run_experts(x, ids, gates, weights, activation="silu")
    chosen = np.array(data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=80)))
    threads = data.draw(st.integers(1, 3))
    part = run_experts(x[chosen], ids[chosen], gates[chosen], weights, activation="silu", threads=threads)
    np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set_gives_the_same_bits(format: str) -> None:
    weights = make_experts(format, hidden=200, intermediate=130)
    x, ids, gates = make_rows(weights, 7)
    results = []
    for name in edge_kernels.available_isas():
        edge_kernels.set_isa(name)
        results.append(run_experts(x, ids, gates, weights, activation="silu"))
    edge_kernels.set_isa(edge_kernels.available_isas()[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("format", FORMATS)
def test_threads_do_not_change_bits(isa: str, format: str) -> None:
    weights = make_experts(format, hidden=512, intermediate=640)  # enough weights for several threads
    x, ids, gates = make_rows(weights, 3)
    alone = run_experts(x, ids, gates, weights, activation="silu")
    for threads in (2, 5):
        np.testing.assert_array_equal(
            run_experts(x, ids, gates, weights, activation="silu", threads=threads), alone
        )


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integer_part_survives_extreme_codes(isa: str, format: str) -> None:
    """All codes at the ends of their range: nothing may saturate on the way."""
    weights = make_experts(format, experts=1, hidden=64, intermediate=64)
    for part in PARTS:
        weights.part(0, part)[...] = 0
        weights.part(0, f"{part}_scales")[...] = 1e-3
    x = np.full((1, 64), -1.0, np.float32)
    got = run_experts(x, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), weights, activation="silu")
    expected = reference.run_experts(
        x, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), weights, activation="silu"
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_broken_row_shows_and_spares_its_neighbours(isa: str, format: str) -> None:
    weights = make_experts(format)
    x, ids, gates = make_rows(weights, 5)
    whole = run_experts(x, ids, gates, weights, activation="silu")
    x[2, 3] = np.inf
    broken = run_experts(x, ids, gates, weights, activation="silu")
    assert np.isnan(broken[2]).any()
    np.testing.assert_array_equal(np.delete(broken, 2, 0), np.delete(whole, 2, 0))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_of_zeros_give_zeros(isa: str, format: str) -> None:
    weights = make_experts(format)
    _, ids, gates = make_rows(weights, 2)
    assert not run_experts(np.zeros((2, 64), np.float32), ids, gates, weights, activation="silu").any()


def test_ranks_are_added_in_order() -> None:
    """Float addition is not associative: swapping ranks may change bits, and equals the sum written out."""
    weights = make_experts("fp32")
    x, ids, gates = make_rows(weights, 1, top_k=3)
    total = np.zeros(64)
    for rank in range(3):
        one = run_experts(x, ids[:, rank : rank + 1], np.ones((1, 1), np.float32), weights, activation="silu")
        exact = total + np.float64(gates[0, rank]) * one[0].astype(np.float64)
        total = exact.astype(np.float32).astype(np.float64)  # fused: one rounding per rank
    got = run_experts(x, ids, gates, weights, activation="silu")
    np.testing.assert_allclose(got[0], total, rtol=2e-7, atol=1e-9)


@given(
    rows=st.integers(1, 5),
    experts=st.integers(1, 40),
    data=st.data(),
    normalize=st.booleans(),
    softmax_after=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_routing_equals_the_reference(
    rows: int, experts: int, data: st.DataObject, normalize: bool, softmax_after: bool
) -> None:
    top_k = data.draw(st.integers(1, experts))
    values = st.sampled_from([-50.0, -1.5, 0.0, 0.5, 0.5, 2.0, 30.0])  # many ties
    logits = np.array(
        data.draw(st.lists(values, min_size=rows * experts, max_size=rows * experts)), np.float32
    ).reshape(rows, experts)
    ids, gates = route(logits, top_k=top_k, normalize=normalize, softmax_after=softmax_after)
    expected_ids, expected_gates = reference.route(
        logits, top_k=top_k, normalize=normalize, softmax_after=softmax_after
    )
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5, atol=1e-12)


def test_routing_a_broken_row_spares_its_neighbours() -> None:
    logits = np.array([[1.0, np.nan, 0.0], [1.0, 3.0, 2.0]], np.float32)
    ids, gates = route(logits, top_k=2, normalize=True, softmax_after=False)
    assert np.isnan(gates[0]).all()
    assert ids[1].tolist() == [1, 2]
    assert ((ids >= 0) & (ids < 3)).all()


def without_down(w: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(w.buffer, "int4", 4, 64, 96, w.stride_bytes, {"gate": 0, "up": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: ExpertWeights(w.buffer[:-64], "int4", 4, 64, 96, w.stride_bytes, w.offsets),
            "ends at byte",
        ),
        (lambda w: ExpertWeights(w.buffer, "int4", 5, 64, 96, w.stride_bytes, w.offsets), "ends at byte"),
        (
            lambda w: ExpertWeights(w.buffer, "int3", 4, 64, 96, w.stride_bytes, w.offsets),
            "unknown expert format",
        ),
        (without_down, "need the parts"),
        (lambda w: ExpertWeights(w.buffer, "int4", 4, 0, 96, w.stride_bytes, w.offsets), "at least one"),
    ],
)
def test_impossible_layouts_are_refused(
    change: Callable[[ExpertWeights], ExpertWeights], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change(make_experts("int4"))


def test_bad_calls_are_refused() -> None:
    weights = make_experts("int4")
    x, ids, gates = make_rows(weights, 2)
    for bad in (-1, 4):
        wrong = ids.copy()
        wrong[1, 1] = bad
        with pytest.raises(ValueError, match="out of range"):
            run_experts(x, wrong, gates, weights, activation="silu")
    with pytest.raises(ValueError, match="hidden width"):
        run_experts(x[:, :-1], ids, gates, weights, activation="silu")
    with pytest.raises(ValueError, match="shape"):
        run_experts(x, ids, gates[:, :1], weights, activation="silu")
    with pytest.raises(ValueError, match="activation"):
        run_experts(x, ids, gates, weights, activation="gelu")
    with pytest.raises(ValueError, match="experts a row"):
        route(np.zeros((1, 3), np.float32), top_k=4, normalize=False, softmax_after=False)
