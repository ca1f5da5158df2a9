"""Every operation of a bundle as a few lines of NumPy, one row at a time: what the other executors must agree with.

Products are matrix times one row, so that a row's bits never depend on its neighbours.
Knows: the mathematics of `bundle/operations.py`. Does not know: batches, sessions, caches or formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.operations import Attribute

Array = NDArray[np.float32]  # a row [width], rows [R, width] or a weight

_erf = np.frompyfunc(math.erf, 1, 1)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = np.stack([weight @ row for row in x])
    return y if bias is None else y + bias


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(epsilon)) * weight, np.float32)


def layer_norm(x: Array, weight: Array, bias: Array | None, epsilon: float) -> Array:
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    y: Array = centred / np.sqrt(variance + np.float32(epsilon)) * weight
    return y if bias is None else y + bias


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    erf = np.asarray(_erf(x * np.float32(math.sqrt(0.5))), np.float32)
    return np.float32(0.5) * x * (1 + erf)


def gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)), np.float32)


def softcap(x: Array, cap: float) -> Array:
    return np.asarray(np.float32(cap) * np.tanh(x / np.float32(cap)), np.float32)


def softmax(x: Array) -> Array:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.asarray(e / np.sum(e, axis=-1, keepdims=True), np.float32)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "tanh": np.tanh,
}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """`x` [heads, d] of one row; cos and sin [rotary / 2] of its position. Entries beyond `rotary` stay."""
    half = cos.shape[-1]
    low, high, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)


def norm_heads(x: Array, weight: Array | None, heads: int, epsilon: float) -> Array:
    """q or k of one row as [heads, d], normalised per head or over the whole row, as the weight's size says."""
    if weight is not None and weight.size == x.size and heads > 1:
        x = rms_norm(x, weight.reshape(-1), epsilon)
    split = x.reshape(heads, -1)
    if weight is not None and (weight.size != x.size or heads == 1):
        split = rms_norm(split, weight.reshape(-1), epsilon)
    return split


def attend(q: Array, keys: Array, values: Array, attributes: Mapping[str, Attribute]) -> Array:
    """One row: q [heads, d] over the rows it may see, keys and values [L, kv_heads, d]. Returns [heads * d]."""
    group = len(q) // keys.shape[1]
    cap = float(attributes["softcap"])
    out = []
    for head, query in enumerate(q):
        scores = np.ascontiguousarray(keys[:, head // group]) @ query * np.float32(attributes["scale"])
        weights = softmax(softcap(scores, cap) if cap > 0 else scores)
        out.append(weights @ np.ascontiguousarray(values[:, head // group]))
    return np.concatenate(out)


def visible(position: int, length: int, attributes: Mapping[str, Attribute]) -> slice:
    """Rows of a sequence of `length` rows that the row at `position` sees."""
    if not attributes["causal"]:
        return slice(0, length)
    window = int(attributes["window"])
    return slice(max(0, position + 1 - window) if window else 0, position + 1)


def route(logits: Array, top_k: int, normalize: bool, softmax_after: bool) -> tuple[NDArray[np.intp], Array]:
    """One row's experts, largest gate first (ties to the lower expert), and their gates."""
    chosen = np.argsort(-logits, kind="stable")[:top_k]
    if softmax_after:
        return chosen, softmax(logits[chosen])
    gates = softmax(logits)[chosen]
    return chosen, gates / np.sum(gates) if normalize else gates


def pool(rows: Array, mode: str, normalize: bool) -> Array:
    """Rows of one whole sequence to one vector."""
    vector = np.asarray(rows[0] if mode == "cls" else np.mean(rows, axis=0), np.float32)
    return vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12)) if normalize else vector
