"""ONNX graphs of runs of operations, written apart from the exporter's, so that the two check each other.

Knows: how each operation that is no cut is said in ONNX. Does not know: which operations make a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_runtime.bundle.manifest import Tensor
from edge_runtime.bundle.operations import Operation


def segment_graph(
    operations: Sequence[Operation],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tensors: dict[str, Tensor],
) -> bytes:
    """Values get an `_in` suffix while they are inputs, since `hidden` may be both an input and an output."""
    names = {value: f"{value}_in" for value in inputs}
    graph = _Graph(tensors)
    for operation in operations:
        sources = [names.get(value, value) for value in operation.inputs]
        names.pop(operation.outputs[0], None)
        graph.add(operation, sources)
    proto = helper.make_graph(
        graph.nodes,
        "segment",
        [helper.make_tensor_value_info(f"{value}_in", TensorProto.FLOAT, ["R", None]) for value in inputs],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["R", None]) for value in outputs],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=9).SerializeToString()


class _Graph:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def constant(self, value: float) -> str:
        name = f"constant_{value}"
        self.initializers[name] = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return name

    def weight(self, tensor: str, part: str) -> str:
        """An external initializer, named after the tensor, at its place in the slice."""
        name = f"{tensor}.{part}"
        at = self.tensors[tensor].parts[part]
        proto = onnx.TensorProto(
            name=name,
            dims=at.shape if part != "scales" else [int(np.prod(at.shape))],
            data_type=TensorProto.FLOAT if at.dtype == "float32" else TensorProto.UINT8,
            data_location=TensorProto.EXTERNAL,
        )
        size_bytes = int(np.prod(at.shape)) * np.dtype(at.dtype).itemsize
        for key, value in (("location", at.slice), ("offset", at.offset_bytes), ("length", size_bytes)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers[name] = proto
        return name

    def add(self, o: Operation, x: list[str]) -> None:
        out, tag = o.outputs[0], o.name
        if o.kind == "linear":
            self._linear(o, x[0], out)
        elif o.kind == "rms_norm":
            scale = self.weight(o.weights["weight"], "data")
            self.node(
                "SimplifiedLayerNormalization", [x[0], scale], out, axis=-1, epsilon=o.attributes["epsilon"]
            )
        elif o.kind == "layer_norm":
            names = [self.weight(o.weights[slot], "data") for slot in ("weight", "bias")]
            self.node("LayerNormalization", [x[0], *names], out, axis=-1, epsilon=o.attributes["epsilon"])
        elif o.kind in ("add", "mul"):
            self.node(o.kind.capitalize(), x, out)
        elif o.kind == "silu":
            self.node("Mul", [x[0], self.node("Sigmoid", x, f"{tag}/sigmoid")], out)
        elif o.kind in ("gelu", "gelu_tanh"):
            self.node("Gelu", x, out, approximate="tanh" if o.kind == "gelu_tanh" else "none")
        elif o.kind == "tanh":
            self.node("Tanh", x, out)
        elif o.kind == "scale":
            self.node("Mul", [x[0], self.constant(float(o.attributes["factor"]))], out)
        elif o.kind == "softcap":
            cap = self.constant(float(o.attributes["cap"]))
            inner = self.node("Tanh", [self.node("Div", [x[0], cap], f"{tag}/div")], f"{tag}/tanh")
            self.node("Mul", [inner, cap], out)
        else:
            raise ValueError(o.kind)

    def _linear(self, o: Operation, x: str, out: str) -> None:
        name = o.weights["weight"]
        tensor = self.tensors[name]
        target = f"{o.name}/product" if "bias" in o.weights else out
        if tensor.format == "fp32":
            self.node("Gemm", [x, self.weight(name, "data")], target, transB=1)
        else:
            rows, columns = tensor.shape
            self.node(
                "MatMulNBits",
                [x, self.weight(name, "data"), self.weight(name, "scales")],
                target,
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=8 if tensor.format == "int8" else 4,
                block_size=32,
                accuracy_level=4,
            )
        if "bias" in o.weights:
            self.node("Add", [target, self.weight(o.weights["bias"], "data")], out)
