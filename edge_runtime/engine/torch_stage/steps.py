"""Every kind of operation as a step over tensors [R, width].

Knows: the operations of `bundle/operations.py`, and which kernel does which. Does not know: stages, sessions, batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from edge_kernels.triton.shapes import AttentionShape, AttentionWeights
from torch import Tensor

from edge_runtime.bundle.operations import Operation
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic
from edge_runtime.engine.torch_stage.rows import TorchContext
from edge_runtime.engine.torch_stage.weights import DeviceWeights
from edge_runtime.errors import EngineError

Step = Callable[[Sequence[Tensor], TorchContext], Tensor]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "tanh")


class _MakeStep(Protocol):
    def __call__(self, operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step: ...


def make_step(
    operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic, kv_index: int, exact: bool
) -> Step:
    """`kv_index`: among the attention operations of its block. `exact`: its result stays float32."""
    if operation.kind == "linear":
        return _linear(operation, weights, arithmetic, torch.float32 if exact else arithmetic.dtype)
    if operation.kind == "attention":
        return _attention(operation, weights, arithmetic, kv_index)
    if operation.kind in ACTIVATIONS:
        kernels, kind = arithmetic.module, operation.kind
        return lambda x, _: kernels.activation(x[0], kind)
    make = _MAKERS.get(operation.kind)
    if make is None:
        raise EngineError(f"{operation.name}: the torch executor does not know {operation.kind}")
    return make(operation, weights, arithmetic)


def _linear(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic, dtype: torch.dtype) -> Step:
    kernels, matrix = arithmetic.module, weights.matrix(operation.weights["weight"])
    bias = _optional(operation, weights, "bias")
    return lambda x, _: kernels.linear(x[0], matrix, bias, dtype)


def _rms_norm(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    kernels, weight = arithmetic.module, weights.vector(operation.weights["weight"])
    epsilon = float(operation.attributes["epsilon"])
    return lambda x, _: kernels.rms_norm(x[0], weight, epsilon)


def _layer_norm(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    kernels, weight = arithmetic.module, weights.vector(operation.weights["weight"])
    bias, epsilon = _optional(operation, weights, "bias"), float(operation.attributes["epsilon"])
    return lambda x, _: kernels.layer_norm(x[0], weight, bias, epsilon)


def _add(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    return lambda x, _: x[0] + x[1]


def _mul(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    return lambda x, _: x[0] * x[1]


def _scale(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    factor = float(operation.attributes["factor"])
    return lambda x, _: x[0] * factor


def _softcap(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    kernels, cap = arithmetic.module, float(operation.attributes["cap"])
    return lambda x, _: kernels.softcap(x[0], cap)


def _embedding(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    """Rows are gathered and decoded in float32, and rounded once."""
    table = weights.matrix(operation.weights["weight"])
    factor = float(operation.attributes["factor"])
    position = weights.matrix(operation.weights["position"]) if "position" in operation.weights else None
    token_type = (
        weights.matrix(operation.weights["token_type"]) if "token_type" in operation.weights else None
    )

    def run(_: Sequence[Tensor], context: TorchContext) -> Tensor:
        rows = table.take(context.ids) * factor
        if position is not None:
            rows = rows + position.take(context.positions)
        if token_type is not None:
            rows = rows + token_type.take(torch.zeros_like(context.ids[:1]))
        return rows.to(arithmetic.dtype)

    return run


def _attention(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic, kv_index: int) -> Step:
    attributes, kernels = operation.attributes, arithmetic.module
    shape = AttentionShape(
        heads=int(attributes["heads"]),
        kv_heads=int(attributes["kv_heads"]),
        head_dim=int(attributes["head_dim"]),
        scale=float(attributes["scale"]),
        window=int(attributes["window"]),
        softcap=float(attributes["softcap"]),
        causal=bool(attributes["causal"]),
        norm_epsilon=float(attributes["norm_epsilon"]),
    )
    rope = str(attributes["rope"])
    q_norm, k_norm = _optional(operation, weights, "q_norm"), _optional(operation, weights, "k_norm")

    def run(x: Sequence[Tensor], context: TorchContext) -> Tensor:
        cos, sin = context.ropes[rope] if rope else (None, None)
        given = AttentionWeights(q_norm, k_norm, cos, sin)
        layer = context.kv_layer + kv_index
        repeated = context.repeated
        if repeated is None:
            return kernels.attention(x[0], x[1], x[2], context.pool, layer, context.rows, shape, given)
        q, k, v = (rows[repeated.index] for rows in x)
        return kernels.attention(q, k, v, context.pool, layer, context.rows, shape, given)[repeated.own]

    return run


def _experts(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    attributes, kernels = operation.attributes, arithmetic.module
    if attributes["activation"] != "silu":
        raise EngineError(f"{operation.name}: experts know silu, not {attributes['activation']!r}")
    bank = weights.experts(operation.weights["experts"])
    top_k, normalize = int(attributes["top_k"]), bool(attributes["normalize"])
    softmax_after = bool(attributes["softmax_after"])

    def run(x: Sequence[Tensor], _: TorchContext) -> Tensor:
        ids, gates = kernels.route(x[1], top_k, normalize=normalize, softmax_after=softmax_after)
        return kernels.experts(x[0], ids, gates, bank)

    return run


def _pool(operation: Operation, weights: DeviceWeights, arithmetic: Arithmetic) -> Step:
    """One vector per span, from a copy of its rows alone."""
    mode, normalize = str(operation.attributes["mode"]), bool(operation.attributes["normalize"])

    def run(x: Sequence[Tensor], context: TorchContext) -> Tensor:
        vectors = []
        for start, end in pairwise(context.layout.starts):
            rows = x[0][start:end].to(torch.float32, copy=True)
            vector = rows[0] if mode == "cls" else rows.mean(0)
            vectors.append(vector / vector.norm().clamp(min=1e-12) if normalize else vector)
        return torch.stack(vectors)

    return run


_MAKERS: dict[str, _MakeStep] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add": _add,
    "mul": _mul,
    "scale": _scale,
    "softcap": _softcap,
    "embedding": _embedding,
    "experts": _experts,
    "pool": _pool,
}


def _optional(operation: Operation, weights: DeviceWeights, slot: str) -> Tensor | None:
    return weights.vector(operation.weights[slot]) if slot in operation.weights else None
