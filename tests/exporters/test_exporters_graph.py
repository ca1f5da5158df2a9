"""Segments: what they take and give, and that a row's bits don't depend on its neighbours."""

from __future__ import annotations

from pathlib import Path

import edge_kernels
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edge_kernels.quantization import quantize

from edge_runtime.bundle.manifest import Part, Tensor
from edge_runtime.bundle.operations import Operation
from edge_runtime.engine import reference_operations as ops
from exporters.graph import CompiledSegment, compile_segments

WIDTH, WIDE = 48, 70
SLICE = "layers.0"


class Slice:
    """Tensors laid out in memory as a slice."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, values: np.ndarray, format: str = "fp32") -> None:
        if format == "fp32":
            parts = {"data": self._part(values)}
        else:
            quantized = quantize(values, format)
            parts = {"data": self._part(quantized.data), "scales": self._part(quantized.scales)}
        self.tensors[name] = Tensor(format, values.shape, parts)

    def _part(self, values: np.ndarray) -> Part:
        self.bytes += bytes(-len(self.bytes) % 4096)
        part = Part(SLICE, len(self.bytes), str(values.dtype), values.shape)
        self.bytes += values.tobytes()
        return part

    def session(self, segment: CompiledSegment) -> ort.InferenceSession:
        options = ort.SessionOptions()
        data = bytes(self.bytes)
        options.add_external_initializers_from_files_in_memory([SLICE], [data], [len(data)])
        return ort.InferenceSession(segment.model, options, providers=["CPUExecutionProvider"])


def operation(
    kind: str, inputs: str, output: str, weights: dict[str, str] | None = None, **attributes: float
):
    return Operation(kind, f"/{kind}/{output}", tuple(inputs.split()), (output,), weights or {}, attributes)


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
def test_a_segment_computes_its_operations_row_by_row(format: str) -> None:
    rng = np.random.default_rng(5)
    data = Slice()
    up = rng.standard_normal((WIDE, WIDTH)).astype(np.float32)
    down = rng.standard_normal((WIDTH, WIDE)).astype(np.float32)
    gain, shift = rng.standard_normal((2, WIDTH)).astype(np.float32)
    bias = rng.standard_normal(WIDE).astype(np.float32)
    data.add("up", up, format)
    data.add("down", down, format)
    for name, vector in (("gain", gain), ("shift", shift), ("bias", bias)):
        data.add(name, vector)
    operations = (
        operation("layer_norm", "hidden", "normed", {"weight": "gain", "bias": "shift"}, epsilon=1e-5),
        operation("rms_norm", "normed", "again", {"weight": "gain"}, epsilon=1e-5),
        operation("linear", "again", "wide", {"weight": "up", "bias": "bias"}),
        operation("silu", "wide", "a"),
        operation("gelu", "wide", "b"),
        operation("gelu_tanh", "wide", "c"),
        operation("mul", "a b", "ab"),
        operation("add", "ab c", "abc"),
        operation("softcap", "abc", "capped", cap=3.0),
        operation("scale", "capped", "scaled", factor=0.25),
        operation("tanh", "scaled", "bounded"),
        operation("linear", "bounded", "narrow", {"weight": "down"}),
        operation("add", "hidden narrow", "hidden"),
    )
    (segment,) = compile_segments("layers.0", operations, data.tensors, WIDTH)
    assert (segment.inputs, segment.outputs) == (("hidden",), ("hidden",))
    session = data.session(segment)
    x = rng.standard_normal((65, WIDTH)).astype(np.float32)
    found = session.run(None, {"hidden": x})[0]

    again = ops.rms_norm(ops.layer_norm(x, gain, shift, 1e-5), gain, 1e-5)
    wide = ops.linear(again, up, bias)
    capped = ops.softcap(ops.silu(wide) * ops.gelu(wide) + ops.gelu_tanh(wide), 3.0)
    expected = x + ops.linear(np.tanh(capped * np.float32(0.25)), down)
    tolerance = {"fp32": 1e-5, "int8": 0.03, "int4": 0.2}[format]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < tolerance

    if format == "int4" and "avx512" not in edge_kernels.available_isas():
        return  # ONNX Runtime's 4-bit products of few rows differ from those of one there; an agent's probe finds out
    for rows in (1, 2, 3, 8, 17, 64):
        for start in (0, 1):
            part = session.run(None, {"hidden": x[start : start + rows]})[0]
            np.testing.assert_array_equal(part, found[start : start + rows])


def test_cut_operations_separate_segments_and_pass_only_what_is_read_later() -> None:
    data = Slice()
    data.add("w", np.eye(WIDTH, dtype=np.float32))
    attributes = {"heads": 2, "kv_heads": 2, "head_dim": 24, "scale": 1.0, "window": 0, "softcap": 0.0}
    attention = Operation(
        "attention", "/attend", ("q", "q", "q"), ("attended",), {},
        {**attributes, "rope": "", "causal": True, "norm_epsilon": 0.0},
    )  # fmt: skip
    operations = (
        operation("scale", "hidden", "unused", factor=2.0),
        operation("linear", "unused", "q", {"weight": "w"}),
        attention,
        operation("add", "hidden attended", "hidden"),
        operation("scale", "hidden", "hidden", factor=3.0),
    )
    first, second = compile_segments("layers.0", operations, data.tensors, WIDTH)
    assert (first.first_operation, first.last_operation) == (0, 1)
    assert (first.inputs, first.outputs) == (("hidden",), ("q",))
    assert (second.first_operation, second.last_operation) == (3, 4)
    assert (second.inputs, second.outputs) == (("hidden", "attended"), ("hidden",))
    x = np.ones((2, WIDTH), np.float32)
    result = data.session(second).run(None, {"hidden": x, "attended": x})
    np.testing.assert_array_equal(result[0], np.full((2, WIDTH), 6, np.float32))


def test_graphs_hold_no_weights(tmp_path: Path) -> None:
    data = Slice()
    data.add("w", np.ones((WIDE, WIDTH), np.float32))
    operations = (operation("linear", "hidden", "hidden", {"weight": "w"}),)
    (segment,) = compile_segments("head", operations, data.tensors, WIDTH)
    model = onnx.ModelProto.FromString(segment.model)
    (weight,) = model.graph.initializer
    fields = {entry.key: entry.value for entry in weight.external_data}
    assert fields == {"location": SLICE, "offset": "0", "length": str(4 * WIDE * WIDTH)}
    assert len(segment.model) < 1024
    assert [node.name for node in model.graph.node] == ["/linear/hidden"]
