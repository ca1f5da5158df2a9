"""What the native kernels compute, in NumPy: short, row by row, slow. Tests compare the two.

Knows: arithmetic. Does not know: instruction sets, threads, or bit-exact reduction orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_kernels.attention import RaggedRows
    from edge_kernels.experts import ExpertWeights

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
PAGE_TOKENS = 32


def prepare_qk(
    q: F32,
    k: F32,
    positions: I32,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cos: F32 | None,
    sin: F32 | None,
    q_norm: F32 | None,
    k_norm: F32 | None,
    norm_epsilon: float,
) -> tuple[F32, F32]:
    """RMS norm (where weights are given), then rotary embedding (where tables are given), of new queries and keys."""
    prepared = []
    for x, count, weight in ((q, heads, q_norm), (k, kv_heads, k_norm)):
        y = x.reshape(len(x), count, head_dim).astype(np.float32)
        if weight is not None:
            per_head = weight.size == head_dim
            y = y if per_head else y.reshape(len(x), 1, count * head_dim)
            y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + np.float32(norm_epsilon)) * weight
            y = y.reshape(len(x), count, head_dim)
        if cos is not None and sin is not None:
            y = _rotate(y, cos[positions][:, None], sin[positions][:, None])
        prepared.append(np.ascontiguousarray(y.reshape(len(x), count * head_dim), np.float32))
    return prepared[0], prepared[1]


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate pair (i, i + r/2) of the first r entries of every head."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def append_kv(pool: F32, layer: int, k: F32, v: F32, rows: RaggedRows) -> None:
    """Write new rows' keys and values [R, kv_heads * head_dim] into their pages."""
    pages = rows.block_tables[rows.sequence, rows.positions // PAGE_TOKENS]
    slots = rows.positions % PAGE_TOKENS
    for which, new in ((0, k), (1, v)):
        pool[pages, layer, which, slots] = new.reshape(len(new), pool.shape[4], pool.shape[5])


def paged_attention(
    q: F32,
    pool: F32,
    layer: int,
    rows: RaggedRows,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> F32:
    """Softmax(scale * q k^T) v over the rows each row sees: [R, heads * head_dim]."""
    out = np.empty((len(q), heads, head_dim), np.float32)
    group = heads // kv_heads
    for r, (position, s) in enumerate(zip(rows.positions, rows.sequence, strict=True)):
        first, last = visible_rows(int(position), int(rows.lengths[s]), window, causal)
        seen = np.arange(first, last)
        pages, slots = rows.block_tables[s, seen // PAGE_TOKENS], seen % PAGE_TOKENS
        keys, values = (
            pool[pages, layer, which, slots].astype(np.float64) for which in (0, 1)
        )  # [n, kv_heads, d]
        for h in range(heads):
            scores = keys[:, h // group] @ q[r, h * head_dim : (h + 1) * head_dim] * scale
            if softcap > 0:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[r, h] = weights / weights.sum() @ values[:, h // group]
    return out.reshape(len(q), heads * head_dim)


def visible_rows(position: int, length: int, window: int, causal: bool) -> tuple[int, int]:
    """First row seen and one past the last, for the row at `position`. Windows are for causal attention only."""
    if not causal:
        return 0, length
    return (max(0, position - window + 1) if window > 0 else 0), position + 1


def route(logits: F32, *, top_k: int, normalize: bool, softmax_after: bool) -> tuple[I32, F32]:
    """Chosen experts (largest logit first, ties to the lower id) and their gates, both [R, top_k]."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    gates = np.take_along_axis(exps, ids.astype(np.int64), -1)
    if softmax_after or normalize:
        return ids, gates / gates.sum(-1, keepdims=True)
    return ids, gates / exps.sum(-1, keepdims=True)


def run_experts(x: F32, ids: I32, gates: F32, weights: ExpertWeights, *, activation: str) -> F32:
    """Sum over a row's experts, in the order given, of gate * down(silu(gate_proj x) * up_proj x): [R, hidden].

    Quantized weights meet activations rounded to int8.
    """
    if activation != "silu":
        raise ValueError(f"unknown activation {activation!r}: experts know silu")
    rounded = _as_it_is if weights.format == "fp32" else int8_rounded
    out = np.zeros((len(x), weights.hidden), np.float32)
    for r in range(len(x)):
        row = rounded(x[r])
        for expert, gate in zip(ids[r], gates[r], strict=True):
            g = weights.matrix(int(expert), "gate") @ row
            u = weights.matrix(int(expert), "up") @ row
            inner = rounded(g / (1 + np.exp(-g)) * u)
            out[r] += gate * (weights.matrix(int(expert), "down") @ inner)
    return out


def linear(x: F32, weights: F32, bias: F32 | None, *, quantized: bool) -> F32:
    """x W^T + bias; where the weights are quantized, activations are rounded to int8."""
    rows = np.stack([int8_rounded(row) for row in x]) if quantized else x
    y = rows.astype(np.float64) @ weights.T.astype(np.float64)
    return (y if bias is None else y + bias).astype(np.float32)


def half_scales(scales: F32) -> F32:
    """Scales as they are packed: half floats, once a power of two has brought the largest just below 2^15."""
    largest = float(np.abs(scales).max())
    power = 2.0 ** (15 - np.frexp(largest)[1]) if largest > 0 else 1.0
    return (scales * np.float32(power)).astype(np.float16).astype(np.float32) / np.float32(power)


def row_operation(
    kind: str, inputs: Sequence[F32], weight: F32 | None, bias: F32 | None, parameter: float
) -> F32:
    """One operation of `edge_kernels.program` on rows, in float64."""
    x = inputs[0].astype(np.float64)
    if kind in ("rms_norm", "layer_norm"):
        centred = x - x.mean(-1, keepdims=True) if kind == "layer_norm" else x
        y = centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + parameter)
        return np.asarray(y * (1 if weight is None else weight) + (0 if bias is None else bias), np.float32)
    functions: dict[str, Callable[[], NDArray[np.float64]]] = {
        "add": lambda: x + inputs[1],
        "mul": lambda: x * inputs[1],
        "silu": lambda: x / (1 + np.exp(-x)),
        "gelu": lambda: 0.5 * x * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "tanh": lambda: np.tanh(x),
        "scale": lambda: x * parameter,
        "softcap": lambda: parameter * np.tanh(x / parameter),
    }
    return np.asarray(functions[kind](), np.float32)


def int8_rounded(x: F32) -> F32:
    """Blocks of 32 rounded to multiples of (largest / 127); blocks of nothing but tiny values become 0."""
    padded = np.zeros(-(-x.size // 32) * 32, np.float32)
    padded[: x.size] = x
    blocks = padded.reshape(-1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    largest = np.where(largest <= 1e-30, np.float32(np.inf), largest)
    codes = np.rint(blocks * (np.float32(127) / largest))
    scales = np.where(np.isinf(largest), np.float32(0), largest / np.float32(127))
    return (codes * scales).reshape(-1)[: x.size].astype(np.float32)


def _as_it_is(x: F32) -> F32:
    return x
