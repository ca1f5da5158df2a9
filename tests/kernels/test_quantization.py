"""Block quantization: the layout ONNX Runtime reads, and scales better than plain rounding."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from edge_kernels.quantization import BITS, QuantizedMatrix, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def mean_square(error: NDArray[np.float32]) -> float:
    return float(np.mean(error.astype(np.float64) ** 2))


def plainly_rounded(w: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Scale = largest / highest code, round to nearest."""
    high = 2 ** (bits - 1) - 1
    blocks = w.reshape(len(w), -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / high
    return (np.clip(np.rint(blocks / scales), -high - 1, high) * scales).reshape(w.shape).astype(np.float32)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 130),
    format=st.sampled_from(sorted(BITS)),
    seed=st.integers(0, 99),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_every_weight_is_within_one_step_of_its_code(
    rows: int, columns: int, format: str, seed: int, magnitude: float
) -> None:
    w = weights(rows, columns, seed) * np.float32(magnitude)
    quantized = quantize(w, format)
    blocks = -(-columns // 32)
    assert quantized.data.shape == (rows, blocks, 32 * BITS[format] // 8)
    assert quantized.data.dtype == np.uint8
    assert quantized.scales.shape == (rows, blocks)
    restored = dequantize(quantized, format, columns)
    assert restored.shape == w.shape
    step = np.repeat(np.abs(quantized.scales), 32, axis=1)[:, :columns]
    assert (
        np.abs(restored - w) <= 1.6 * step + 1e-30
    ).all()  # a clipped largest weight may lie past the last code


@pytest.mark.parametrize(("format", "at_most"), [("int4", 0.75), ("int8", 1.0)])
def test_error_is_below_plain_rounding(format: str, at_most: float) -> None:
    w = weights(64, 512)
    searched = mean_square(dequantize(quantize(w, format), format, 512) - w)
    assert searched < at_most * mean_square(plainly_rounded(w, BITS[format]) - w)


def test_importance_moves_the_error_to_channels_that_matter_less() -> None:
    w = weights(64, 256)
    importance = np.ones(256, np.float32)
    importance[::8] = 50.0
    plain, weighted = (
        (dequantize(quantize(w, "int4", importance=i), "int4", 256) - w) for i in (None, importance)
    )
    assert mean_square(weighted[:, ::8]) < 0.6 * mean_square(plain[:, ::8])
    assert mean_square(weighted * np.sqrt(importance)) < mean_square(plain * np.sqrt(importance))


def test_blocks_of_zeros_and_single_outliers_survive() -> None:
    w = np.zeros((2, 64), np.float32)
    w[1, 40] = -3.0
    for format in BITS:
        restored = dequantize(quantize(w, format), format, 64)
        np.testing.assert_allclose(restored, w, rtol=1e-6)


def test_chunks_do_not_change_the_result() -> None:
    w = weights(5000, 256)  # more than one chunk of 2^20 weights
    whole = quantize(w, "int4")
    part = quantize(w[4500:], "int4")
    np.testing.assert_array_equal(whole.data[4500:], part.data)
    np.testing.assert_array_equal(whole.scales[4500:], part.scales)


def test_low_nibble_comes_first() -> None:
    data = np.zeros((1, 1, 16), np.uint8)
    data[0, 0, 0] = 0x9F  # low nibble 15 -> +7, high nibble 9 -> +1
    restored = dequantize(QuantizedMatrix(data, np.ones((1, 1), np.float32)), "int4", 32)
    assert restored[0, :3].tolist() == [7.0, 1.0, -8.0]


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_onnx_runtime_reads_the_layout(format: str, level: int) -> None:
    rows, columns = 48, 96
    w, x = weights(rows, columns), weights(3, columns, seed=1)
    quantized = quantize(w, format)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "data", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=BITS[format],
        block_size=32,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", rows])],
        [
            numpy_helper.from_array(quantized.data, "data"),
            numpy_helper.from_array(quantized.scales.reshape(-1), "scales"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    expected = x @ dequantize(quantized, format, columns).T
    tolerance = (
        1e-4 if level == 0 else 0.03 * float(np.abs(expected).max())
    )  # level 4 rounds activations to int8
    np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("w", "format", "importance", "message"),
    [
        (np.ones((2, 32), np.float32), "int5", None, "unknown weight format"),
        (np.ones(32, np.float32), "int4", None, "matrix"),
        (np.full((1, 32), np.nan, np.float32), "int4", None, "finite"),
        (np.ones((1, 32), np.float32), "int4", np.ones(31, np.float32), "importance"),
    ],
)
def test_bad_input_is_refused(
    w: NDArray[np.float32], format: str, importance: NDArray[np.float32] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(w, format, importance=importance)


def test_dequantize_refuses_a_wrong_shape() -> None:
    quantized = quantize(weights(2, 64), "int4")
    with pytest.raises(ValueError, match="needs data"):
        dequantize(quantized, "int8", 64)
