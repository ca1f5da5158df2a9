"""What the Triton kernels compute, in plain torch: float32, one row at a time, no reordering. The CPU's path.

A row is always copied to memory of its own before it is multiplied, so that neither the number of rows nor a row's
place among them can change its bits.

Knows: the mathematics. Does not know: tiles, splits, or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from edge_kernels.triton.shapes import (
    PAGE_TOKENS,
    AttentionShape,
    AttentionWeights,
    ExpertBank,
    Matrix,
    PagedRows,
)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ matrix.T + bias: [R, N] of `dtype`."""
    weight = matrix.dense()
    y = _by_row(lambda row: torch.mv(weight, row), x, matrix.rows)
    return (y if bias is None else y + bias).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last `weight.numel()` entries: a row may hold several heads, each normalised by itself."""

    def norm(row: Tensor) -> Tensor:
        heads = row.view(-1, weight.numel())
        mean_square = (heads * heads).mean(-1, keepdim=True)
        return (heads / torch.sqrt(mean_square + epsilon) * weight).view(-1)

    return _by_row(norm, x, x.shape[1]).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    return _by_row(
        lambda row: functional.layer_norm(row, row.shape, weight, bias, epsilon), x, x.shape[1]
    ).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    return _by_row(ACTIVATIONS[kind], x, x.shape[1]).to(x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    return _by_row(lambda row: cap * torch.tanh(row / cap), x, x.shape[1]).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    layer: int,
    rows: PagedRows,
    shape: AttentionShape,
    weights: AttentionWeights,
) -> Tensor:
    """Norm and rotate q and k, write k and v into `pool` [pages, layers, 2, 32, kv_heads, d], attend: [R, heads * d]"""
    positions = rows.positions.tolist()
    q = _prepare(q.float(), positions, shape, weights, weights.q_norm).view(-1, shape.heads, shape.head_dim)
    k = _prepare(k.float(), positions, shape, weights, weights.k_norm)
    pages = rows.block_tables[rows.sequence.long(), rows.positions.long() // PAGE_TOKENS].long()
    slots = rows.positions.long() % PAGE_TOKENS
    for which, new in ((0, k), (1, v)):
        pool[pages, layer, which, slots] = new.view(-1, shape.kv_heads, shape.head_dim).to(pool.dtype)
    out = torch.empty_like(q)
    for row, (position, s) in enumerate(zip(positions, rows.sequence.tolist(), strict=True)):
        seen = torch.arange(*visible(position, int(rows.lengths[s]), shape))
        pages, slots = rows.block_tables[s][seen // PAGE_TOKENS].long(), seen % PAGE_TOKENS
        keys, values = (pool[pages, layer, which, slots].float() for which in (0, 1))  # [n, kv_heads, d]
        out[row] = _attend(q[row], keys, values, shape)
    return out.view(len(positions), -1)


def visible(position: int, length: int, shape: AttentionShape) -> tuple[int, int]:
    """First row seen and one past the last."""
    if not shape.causal:
        return 0, length
    return (max(0, position - shape.window + 1) if shape.window > 0 else 0), position + 1


def _attend(query: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape) -> Tensor:
    """query [heads, d], keys and values [n, kv_heads, d]: [heads, d]. Sums over rows run in one fixed order."""
    out = torch.empty_like(query)
    for head in range(shape.heads):
        kv = head // shape.group
        scores = (keys[:, kv] * query[head]).sum(-1) * shape.scale
        if shape.softcap > 0:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        out[head] = torch.softmax(scores, 0) @ values[:, kv].contiguous()
    return out


def _prepare(
    x: Tensor, positions: list[int], shape: AttentionShape, weights: AttentionWeights, norm: Tensor | None
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, shape.norm_epsilon)
    if weights.cos is None or weights.sin is None:
        return x
    heads = x.view(len(x), -1, shape.head_dim)
    cos, sin = weights.cos[positions][:, None], weights.sin[positions][:, None]  # [R, 1, rotary / 2]
    half = cos.shape[-1]
    low, high, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
    return rotated.view(len(x), -1)


def route(logits: Tensor, top_k: int, *, normalize: bool, softmax_after: bool) -> tuple[Tensor, Tensor]:
    """Chosen experts (largest logit first, ties to the lower id) int32 and their gates float32, both [R, top_k].

    A row with a logit that is not finite gets NaN gates.
    """
    logits = logits.float()
    ids = torch.argsort(logits.nan_to_num(nan=-torch.inf), dim=-1, descending=True, stable=True)[:, :top_k]
    exps = torch.exp(logits - logits.amax(-1, keepdim=True))
    gates = exps.gather(-1, ids)
    total = gates.sum(-1, keepdim=True) if normalize or softmax_after else exps.sum(-1, keepdim=True)
    gates = torch.where(logits.isfinite().all(-1, keepdim=True), gates / total, torch.nan)
    return ids.int(), gates


def experts(x: Tensor, ids: Tensor, gates: Tensor, bank: ExpertBank) -> Tensor:
    """Sum over a row's experts, in the order given, of gate * down(silu(gate_proj x) * up_proj x): [R, hidden]."""
    rows = [row.clone() for row in x.float()]
    totals = [torch.zeros_like(row) for row in rows]
    chosen = ids.tolist()
    parts: dict[tuple[int, int], Tensor] = {}
    for expert in {expert for row in chosen for expert in row}:
        gate, up, down = (bank.matrix(expert, part).dense() for part in ("gate", "up", "down"))
        for r, row in enumerate(rows):
            for rank in (rank for rank, other in enumerate(chosen[r]) if other == expert):
                inner = functional.silu(torch.mv(gate, row)) * torch.mv(up, row)
                parts[r, rank] = torch.mv(down, inner)
    for r, total in enumerate(totals):
        for rank in range(ids.shape[1]):
            total += gates[r, rank] * parts[r, rank]
    return torch.stack(totals).to(x.dtype)


def _by_row(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    y = torch.empty((len(x), width), dtype=torch.float32, device=x.device)
    for row in range(len(x)):
        y[row] = function(x[row].to(torch.float32, copy=True))
    return y
