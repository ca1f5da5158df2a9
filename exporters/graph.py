"""Runs of uncut operations -> weightless ONNX graphs.

    block:   op op op | attention | op op op op
    segments: [ 0 ]        cut        [ 1 ]

A segment's graph takes the values it reads from outside and gives the values that are read after it, [rows, width]
each, in the order of `Segment.inputs` and `Segment.outputs`. Initializers are external data: location = slice key,
offset and length = the tensor's part, so that an executor maps the slice and hands it over. Node names follow the
operations'.

Knows: how each uncut operation is written in ONNX so that rows don't depend on their neighbours (measured: MatMulNBits
at accuracy level 4 and block 32; Gemm with a constant, prepacked B). Does not know: families, files, quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from edge_runtime.bundle.manifest import QUANTIZATION_BLOCK, TENSOR_FORMATS, Part, Tensor
from edge_runtime.bundle.operations import Operation

OPSET = 20  # the first with Gelu
IR_VERSION = 10
CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
_ONNX_DTYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


@dataclass(frozen=True, slots=True)
class CompiledSegment:
    """A segment before its graph has a place in a slice."""

    model: bytes
    first_operation: int
    last_operation: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def compile_segments(
    name: str, operations: tuple[Operation, ...], tensors: Mapping[str, Tensor], input_width: int
) -> list[CompiledSegment]:
    """One graph for every maximal run of uncut operations of block `name`, whose `hidden` is `input_width` wide."""
    widths = _Widths(operations, tensors, input_width)
    return [
        _compile(f"{name}.{number}", operations, first, last, tensors, widths)
        for number, (first, last) in enumerate(_uncut_runs(operations))
    ]


def _uncut_runs(operations: tuple[Operation, ...]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index, operation in enumerate(operations):
        if operation.is_cut:
            continue
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _compile(
    name: str,
    operations: tuple[Operation, ...],
    first: int,
    last: int,
    tensors: Mapping[str, Tensor],
    widths: _Widths,
) -> CompiledSegment:
    run = operations[first : last + 1]
    read_later = {value for operation in operations[last + 1 :] for value in operation.inputs} | {"hidden"}
    written = {value: None for operation in run for value in operation.outputs}
    inputs = tuple(dict.fromkeys(v for i, op in enumerate(run) for v in op.inputs if _is_outer(run, i, v)))
    outputs = tuple(value for value in written if value in read_later)
    graph = _Graph(tensors, inputs)
    for operation in run:
        graph.add(operation)
    names = {value: graph.current[value] for value in outputs}
    model = graph.model(
        name,
        inputs=[(value, widths.before(first, value)) for value in inputs],
        outputs=[(names[value], widths.before(last + 1, value)) for value in outputs],
    )
    return CompiledSegment(model.SerializeToString(deterministic=True), first, last, inputs, outputs)


def _is_outer(run: tuple[Operation, ...], index: int, value: str) -> bool:
    return all(value not in operation.outputs for operation in run[:index])


class _Widths:
    """The width of every value at every place in a block (`hidden` changes meaning along the way)."""

    def __init__(
        self, operations: tuple[Operation, ...], tensors: Mapping[str, Tensor], input_width: int
    ) -> None:
        self._states: list[dict[str, int]] = [{"hidden": input_width}]
        for operation in operations:
            state = dict(self._states[-1])
            state[operation.outputs[0]] = self._width(operation, state, tensors)
            self._states.append(state)

    def before(self, index: int, value: str) -> int:
        return self._states[index][value]

    @staticmethod
    def _width(operation: Operation, state: Mapping[str, int], tensors: Mapping[str, Tensor]) -> int:
        match operation.kind:
            case "linear":
                return tensors[operation.weights["weight"]].shape[0]
            case "embedding":
                return tensors[operation.weights["weight"]].shape[1]
            case "attention":
                return int(operation.attributes["heads"]) * int(operation.attributes["head_dim"])
        return state[operation.inputs[0]]


class _Graph:
    """Nodes and external initializers of one segment. `current` maps a value's name to its latest tensor's."""

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Iterable[str]) -> None:
        self.current = {value: value for value in inputs}
        self._tensors = tensors
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def add(self, operation: Operation) -> None:
        inputs = [self.current[value] for value in operation.inputs]
        value = operation.outputs[0]
        # ONNX names a tensor once: a value that replaces one read before (the residual stream) gets a name of its own
        output = f"{self.current[value]}.out" if value in self.current else value
        _EMITTERS[operation.kind](self, operation, inputs, output)
        self.current[value] = output

    def node(
        self,
        kind: str,
        operation: Operation,
        inputs: list[str],
        output: str,
        *,
        suffix: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> str:
        name = f"{operation.name}{suffix}"
        self._nodes.append(helper.make_node(kind, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def weight(self, operation: Operation, slot: str, part: str = "data") -> str:
        """The initializer of a tensor's part; "" for an optional weight that is absent."""
        tensor_name = operation.weights.get(slot)
        if tensor_name is None:
            return ""
        name = tensor_name if part == "data" else f"{tensor_name}.{part}"
        if name not in self._initializers:
            self._initializers[name] = _external(name, self._tensors[tensor_name].parts[part])
        return name

    def scalar(self, value: float) -> str:
        """A constant, named after its value and shared by the nodes that use it."""
        name = f"constant.{value!r}"
        self._initializers[name] = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return name

    def format_of(self, operation: Operation) -> Tensor:
        return self._tensors[operation.weights["weight"]]

    def model(
        self, name: str, *, inputs: list[tuple[str, int]], outputs: list[tuple[str, int]]
    ) -> ModelProto:
        def info(entries: list[tuple[str, int]]) -> list[ValueInfoProto]:
            return [
                helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", width])
                for value, width in entries
            ]

        graph = helper.make_graph(
            self._nodes, name, info(inputs), info(outputs), list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edge-runtime"
        )


def _external(name: str, part: Part) -> TensorProto:
    size_bytes = math.prod(part.shape) * np.dtype(part.dtype).itemsize
    tensor = TensorProto(name=name, data_type=_ONNX_DTYPES[part.dtype], dims=part.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", part.slice), ("offset", part.offset_bytes), ("length", size_bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _linear(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    """fp32: Gemm with a transposed constant; int8, int4: MatMulNBits."""
    tensor = graph.format_of(operation)
    bias = graph.weight(operation, "bias")
    if tensor.format == "fp32":
        operands = [*inputs, graph.weight(operation, "weight"), *([bias] if bias else [])]
        graph.node("Gemm", operation, operands, output, transB=1)
        return
    out_width, in_width = tensor.shape
    operands = [*inputs, graph.weight(operation, "weight"), graph.weight(operation, "weight", "scales")]
    if bias:
        operands += ["", "", bias]  # no zero points, no group index
    graph.node(
        "MatMulNBits",
        operation,
        operands,
        output,
        domain=CONTRIB,
        K=in_width,
        N=out_width,
        bits=TENSOR_FORMATS[tensor.format].bits,
        block_size=QUANTIZATION_BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _rms_norm(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    epsilon = float(operation.attributes["epsilon"])
    operands = [*inputs, graph.weight(operation, "weight")]
    graph.node("SimplifiedLayerNormalization", operation, operands, output, axis=-1, epsilon=epsilon)


def _layer_norm(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    bias = graph.weight(operation, "bias")
    operands = [*inputs, graph.weight(operation, "weight"), *([bias] if bias else [])]
    epsilon = float(operation.attributes["epsilon"])
    graph.node("LayerNormalization", operation, operands, output, axis=-1, epsilon=epsilon)


def _silu(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    """x ── Sigmoid ── Mul x ──"""
    gate = graph.node("Sigmoid", operation, inputs, f"{output}.sigmoid", suffix="/sigmoid")
    graph.node("Mul", operation, [*inputs, gate], output)


def _softcap(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    """x ── Div cap ── Tanh ── Mul cap ──"""
    cap = graph.scalar(float(operation.attributes["cap"]))
    ratio = graph.node("Div", operation, [*inputs, cap], f"{output}.ratio", suffix="/div")
    bounded = graph.node("Tanh", operation, [ratio], f"{output}.tanh", suffix="/tanh")
    graph.node("Mul", operation, [bounded, cap], output)


def _scale(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
    graph.node("Mul", operation, [*inputs, graph.scalar(float(operation.attributes["factor"]))], output)


def _gelu(approximate: str) -> Callable[[_Graph, Operation, list[str], str], None]:
    def emit(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
        graph.node("Gelu", operation, inputs, output, approximate=approximate)

    return emit


def _plain(kind: str) -> Callable[[_Graph, Operation, list[str], str], None]:
    def emit(graph: _Graph, operation: Operation, inputs: list[str], output: str) -> None:
        graph.node(kind, operation, inputs, output)

    return emit


_EMITTERS: Mapping[str, Callable[[_Graph, Operation, list[str], str], None]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add": _plain("Add"),
    "mul": _plain("Mul"),
    "tanh": _plain("Tanh"),
    "silu": _silu,
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "scale": _scale,
    "softcap": _softcap,
}
