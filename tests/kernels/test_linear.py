"""Dense products and programs of row operations: equal to the reference, and a row's bits its own on every path."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import edge_kernels
import numpy as np
import pytest
from edge_kernels import _native, reference
from edge_kernels.linear import PackedMatrix, linear, pack, pack_fp32, packed_bytes
from edge_kernels.program import ROW_KINDS, Step, compile_program
from edge_kernels.quantization import QuantizedMatrix, dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

F32 = NDArray[np.float32]
FORMATS = ("fp32", "int8", "int4")


def normal(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(format: str, outputs: int, columns: int, seed: int = 0) -> tuple[PackedMatrix, F32]:
    """A matrix, and what it stands for in float32."""
    weights = normal(outputs, columns, seed=seed)
    if format == "fp32":
        return pack_fp32(weights), weights
    quantized = quantize(weights, format, search=False)
    stored = QuantizedMatrix(quantized.data, reference.half_scales(quantized.scales))
    return pack(quantized.data, quantized.scales, columns), dequantize(stored, format, columns)


def on_every_isa(run: object) -> list[F32]:
    results = []
    for name in edge_kernels.available_isas():
        edge_kernels.set_isa(name)
        results.append(run())  # type: ignore[operator]
    edge_kernels.set_isa(edge_kernels.available_isas()[0])
    return results


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (16, 32), (37, 100), (64, 256), (130, 515)])
def test_agrees_with_the_reference(isa: str, format: str, outputs: int, columns: int) -> None:
    matrix, weights = packed(format, outputs, columns)
    x, bias = normal(19, columns, seed=1), normal(outputs, seed=2)
    found = linear(x, matrix, bias)
    expected = reference.linear(x, weights, bias, quantized=format != "fp32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_is_the_same_in_any_company_on_any_threads_and_isa(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    outputs, columns = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 200))
    rows = data.draw(st.integers(1, 150))
    matrix, _ = packed(format, outputs, columns)
    x = normal(rows, columns, seed=3) * np.float32(10.0 ** data.draw(st.integers(-4, 4)))
    whole = on_every_isa(lambda: linear(x, matrix))
    assert all(np.array_equal(result, whole[0]) for result in whole)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert np.array_equal(linear(x[first:last], matrix), whole[0][first:last])
    assert np.array_equal(linear(x, matrix, threads=data.draw(st.integers(2, 5))), whole[0])


@pytest.mark.parametrize("format", FORMATS)
def test_many_threads_change_no_bit(isa: str, format: str) -> None:
    """Large enough that helpers take part."""
    matrix, _ = packed(format, 1024, 512)
    for rows in (1, 40):
        x = normal(rows, 512, seed=4)
        alone = linear(x, matrix)
        for threads in (2, 3, 8):
            assert np.array_equal(linear(x, matrix, threads=threads), alone)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_row_shows_and_harms_nobody(isa: str, format: str, value: float) -> None:
    matrix, _ = packed(format, 20, 70)
    x = normal(5, 70)
    good = linear(x, matrix)
    x[2, 33] = value
    found = linear(x, matrix)
    assert not np.isfinite(found[2]).any()
    assert np.array_equal(np.delete(found, 2, 0), np.delete(good, 2, 0))


@pytest.mark.parametrize("power", [-30, -6, 0, 6, 20])
def test_scales_of_any_size_keep_eleven_bits(power: int) -> None:
    matrix, _ = packed("int8", 16, 64)
    quantized = quantize(normal(16, 64), "int8", search=False)
    factor = np.float32(10.0**power)
    x = normal(3, 64, seed=1)
    scaled = linear(x, pack(quantized.data, quantized.scales * factor, 64))
    expected = linear(x, matrix) * factor
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_halves_round_to_nearest_even() -> None:
    """One block, one column, code 1 above the zero point: the result is the scale that was stored."""
    halves = np.arange(0x0400, 0x7C00, 37, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = np.concatenate([halves, halves * np.float32(1 + 2**-11), halves * np.float32(1 + 3 * 2**-12)])
    between = between[between < 32752]  # the largest keeps its power of two
    data = np.full((len(between), 1, 32), 128, np.uint8)
    data[:, :, 0] = 129
    found = linear(np.array([[127.0]], np.float32), pack(data, between[:, None], 1))
    np.testing.assert_array_equal(found[0] / 127, between.astype(np.float16).astype(np.float32))


def test_packed_bytes_are_what_a_matrix_takes() -> None:
    for format in FORMATS:
        for shape in ((16, 32), (37, 100), (64, 2048)):
            assert packed(format, *shape)[0].bytes == packed_bytes(format, *shape)


def test_impossible_matrices_are_refused() -> None:
    data, scales = np.zeros((4, 2, 16), np.uint8), np.ones((4, 2), np.float32)
    for bad in (
        (data, scales[:3], 64),
        (data, scales, 65),
        (data, scales, 32),
        (data[:, :, :7], scales, 64),
        (data, np.full((4, 2), np.nan, np.float32), 64),
    ):
        with pytest.raises(ValueError, match="matrix"):
            pack(*bad)
    with pytest.raises(ValueError, match="shape"):
        linear(np.zeros((2, 63), np.float32), pack(data, scales, 64))
    with pytest.raises(ValueError, match="width"):
        linear(np.zeros((2, 64), np.float32), pack(data, scales, 64), np.zeros(5, np.float32))


# ---------------------------------------------------------------- programs

WIDTH = 37


def row_step(kind: str) -> Step:
    inputs = ("a", "b") if kind in ("add", "mul") else ("a",)
    weight = normal(WIDTH, seed=8) if kind.endswith("_norm") else None
    bias = normal(WIDTH, seed=9) if kind == "layer_norm" else None
    parameter = 1e-5 if kind.endswith("_norm") else 3.0
    return Step(kind, inputs, "y", weight=weight, bias=bias, parameter=parameter)


@pytest.mark.parametrize("kind", sorted(ROW_KINDS))
def test_row_operations_agree_with_the_reference(isa: str, kind: str) -> None:
    step = row_step(kind)
    program = compile_program([step], {"a": WIDTH, "b": WIDTH}, ["y"])
    a, b = normal(9, WIDTH) * 4, normal(9, WIDTH, seed=1)
    expected = reference.row_operation(kind, [a, b], step.weight, step.bias, step.parameter)
    np.testing.assert_allclose(program.run([a, b])[0], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(ROW_KINDS))
def test_row_operations_have_the_same_bits_everywhere(kind: str) -> None:
    program = compile_program([row_step(kind)], {"a": WIDTH, "b": WIDTH}, ["y"])
    a, b = normal(200, WIDTH) * 30, normal(200, WIDTH, seed=1)
    first, *others = on_every_isa(lambda: program.run([a, b])[0])
    assert all(np.array_equal(first, other) for other in others)
    assert np.array_equal(program.run([a[7:9], b[7:9]])[0], first[7:9])


def layer(format: str, hidden: int, inner: int) -> tuple[list[Step], list[F32]]:
    """What a decoder layer does after attention, names assigned twice included."""
    shapes = ((hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    matrices, weights = zip(*(packed(format, *shape, seed=i) for i, shape in enumerate(shapes)), strict=True)
    norm = normal(hidden, seed=9)
    steps = [
        Step("linear", ("x",), "o", matrices[0]),
        Step("add", ("hidden", "o"), "hidden"),
        Step("rms_norm", ("hidden",), "n", weight=norm, parameter=1e-6),
        Step("linear", ("n",), "gate", matrices[1], bias=normal(inner, seed=10)),
        Step("silu", ("gate",), "act"),
        Step("linear", ("n",), "up", matrices[2]),
        Step("mul", ("up", "act"), "inner"),
        Step("linear", ("inner",), "down", matrices[3]),
        Step("add", ("hidden", "down"), "hidden"),
    ]
    return steps, list(weights)


def one_by_one(steps: Sequence[Step], values: dict[str, F32]) -> dict[str, F32]:
    """Each step a program of its own: nothing is fused, shared or reused."""
    for step in steps:
        widths = {name: values[name].shape[1] for name in step.inputs}
        program = compile_program([step], widths, [step.output])
        values[step.output] = program.run([values[name] for name in dict.fromkeys(step.inputs)])[0]
    return values


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_is_its_steps_one_by_one(isa: str, format: str, threads: int) -> None:
    steps, _ = layer(format, 96, 224)
    program = compile_program(steps, {"x": 96, "hidden": 96}, ["hidden"])
    for rows in (1, 3, 150):
        x, hidden = normal(rows, 96), normal(rows, 96, seed=1)
        expected = one_by_one(steps, {"x": x, "hidden": hidden})["hidden"]
        np.testing.assert_array_equal(program.run([x, hidden], threads=threads)[0], expected)


def test_a_program_reads_values_that_exist() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        compile_program([Step("silu", ("nowhere",), "y")], {"a": 8}, ["y"])
    with pytest.raises(ValueError, match="unknown operation"):
        compile_program([Step("sorcery", ("a",), "y")], {"a": 8}, ["y"])
    with pytest.raises(ValueError, match="width"):
        compile_program([Step("add", ("a", "b"), "y")], {"a": 8, "b": 9}, ["y"])
    with pytest.raises(ValueError, match="norms have a weight"):
        compile_program([Step("rms_norm", ("a",), "y")], {"a": 8}, ["y"])


def test_a_native_program_refuses_what_would_read_astray() -> None:
    program = _native.Program([8], [8])
    matrix = pack_fp32(np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match="no such value"):
        program.linear(matrix, 7, 1, None)
    with pytest.raises(ValueError, match="does not change its inputs"):
        program.linear(matrix, 0, 0, None)
    with pytest.raises(ValueError, match="before it is made"):
        program.linear(matrix, program.slot(8), 1, None)
    with pytest.raises(ValueError, match="quantized"):
        program.linear(matrix, program.quantized(8, 4), 1, None)
    with pytest.raises(ValueError, match="never made"):
        program.run([np.zeros((1, 8), np.float32)], [np.zeros((1, 8), np.float32)], 1)
    program.linear(matrix, 0, 1, None)
    with pytest.raises(ValueError, match="shape"):
        program.run([np.zeros((2, 8), np.float32)], [np.zeros((1, 8), np.float32)], 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_with_helpers_of_its_own() -> None:
    matrix, _ = packed("int4", 2048, 512)
    x = normal(4, 512)
    expected = linear(x, matrix, threads=3)
    child = os.fork()
    if child == 0:
        same = np.array_equal(linear(x, matrix, threads=3), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads this process's CPU time")
def test_helpers_sleep_when_there_is_nothing_to_do() -> None:
    import time

    matrix, _ = packed("int4", 2048, 512)
    x = normal(4, 512)
    for _ in range(20):
        linear(x, matrix, threads=4)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
