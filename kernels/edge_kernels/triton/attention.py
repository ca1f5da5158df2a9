"""Attention of a ragged batch over the paged pool: prepare and append, attend by splits, combine.

Knows: how the programs of `programs/attention.py` are launched. Does not know: who owns pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels.triton.launch import operand_types, power_of_two, row_major
from edge_kernels.triton.norms import rms_norm
from edge_kernels.triton.programs import attention as programs
from edge_kernels.triton.shapes import PAGE_TOKENS, TILE_ROWS, AttentionShape, AttentionWeights, PagedRows

SPLIT_PAGES = 16  # 512 rows: long contexts are walked by several programs at once


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
    if pool.shape[2:] != (2, PAGE_TOKENS, shape.kv_heads, shape.head_dim) or not pool.is_contiguous():
        raise ValueError(f"a pool is [pages, layers, 2, 32, {shape.kv_heads}, {shape.head_dim}], contiguous")
    q = _prepare(row_major(q), row_major(k), row_major(v), pool, layer, rows, shape, weights)
    count, splits = len(q), -(-rows.longest // (SPLIT_PAGES * PAGE_TOKENS))
    sums = torch.empty((count, shape.heads, splits, shape.head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((count, shape.heads, splits, 2), dtype=torch.float32, device=q.device)
    group = power_of_two(shape.group)
    tiles = rows.tiles(max(1, TILE_ROWS // group))
    operand, dot = operand_types(q.dtype)
    out = torch.empty_like(q)
    padded = power_of_two(shape.head_dim, 16)
    programs.attend[(len(tiles), shape.kv_heads, splits)](
        q,
        pool,
        tiles,
        rows.positions,
        rows.sequence,
        rows.block_tables,
        rows.lengths,
        sums,
        stats,
        shape.scale,
        shape.softcap,
        shape.window,
        splits,
        *_strides(pool, layer, rows),
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        GROUP_PADDED=group,
        TILE_M=max(TILE_ROWS, group),
        D=shape.head_dim,
        D_PADDED=padded,
        PAGE=PAGE_TOKENS,
        SPLIT_PAGES=SPLIT_PAGES,
        CAUSAL=shape.causal,
        HAS_SOFTCAP=shape.softcap > 0,
        DOT=dot,
        OPERAND=operand,
    )
    programs.combine[(count, shape.heads)](
        sums,
        stats,
        out,
        rows.positions,
        rows.sequence,
        rows.lengths,
        shape.window,
        splits,
        HEADS=shape.heads,
        D=shape.head_dim,
        D_PADDED=padded,
        SPLIT_TOKENS=SPLIT_PAGES * PAGE_TOKENS,
        CAUSAL=shape.causal,
    )
    return out


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    layer: int,
    rows: PagedRows,
    shape: AttentionShape,
    weights: AttentionWeights,
) -> Tensor:
    """Queries, ready; keys and values are in the pool."""
    q, q_norm = _whole_row_norm(q, weights.q_norm, shape)
    k, k_norm = _whole_row_norm(k, weights.k_norm, shape)
    half = 0 if weights.cos is None else weights.cos.shape[1]
    out = torch.empty_like(q)
    programs.prepare[(len(q), shape.heads + 2 * shape.kv_heads)](
        q,
        k,
        v,
        out,
        pool,
        rows.positions,
        rows.sequence,
        rows.block_tables,
        q_norm,
        k_norm,
        weights.cos,
        weights.sin,
        shape.norm_epsilon,
        *_strides(pool, layer, rows),
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        D=shape.head_dim,
        D_PADDED=power_of_two(shape.head_dim),
        HALF=half,
        HALF_PADDED=power_of_two(max(half, 1)),
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        PAGE=PAGE_TOKENS,
    )
    return out


def _whole_row_norm(x: Tensor, weight: Tensor | None, shape: AttentionShape) -> tuple[Tensor, Tensor | None]:
    """Norms over a whole row come first; those of single heads are left to `prepare`."""
    if weight is not None and weight.numel() != shape.head_dim:
        return rms_norm(x, weight, shape.norm_epsilon), None
    return x, weight


def _strides(pool: Tensor, layer: int, rows: PagedRows) -> tuple[int, int, int, int]:
    """(of a block table, of a page, offset of the layer in a page, offset of values from keys)."""
    return rows.block_tables.stride(0), pool.stride(0), layer * pool.stride(1), pool.stride(2)
