"""Attention over a paged KV cache, for ragged batches.

The pool is float32 [num_pages, layers, 2, 32, kv_heads, head_dim] (2: keys, values), or int8 with head_dim codes and
their float32 scale in the last four bytes, [..., head_dim + 4]. Row p of a sequence lies in page
`block_tables[sequence, p // 32]` at slot p % 32. A row's result depends on its own sequence and position alone, bit for
bit: keys are reduced page by page on that absolute grid, in order.

Knows: pages, rows, heads. Does not know: who owns pages, sessions, or weights' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native

PAGE_TOKENS = 32
SCALE_BYTES = 4  # behind the codes of one head

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Pool = NDArray[np.float32] | NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Where R rows of S sequences lie. `lengths` counts a sequence's rows, the new ones included."""

    positions: I32  # [R] absolute position in its sequence
    sequence: I32  # [R] index into the next two
    block_tables: I32  # [S, max_blocks] page of each 32 rows; entries past the length are not read
    lengths: I32  # [S]


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
    """RMS norm (where weights are given), then rotary embedding (where tables are given), of new queries and keys.

    A norm's weight has head_dim entries (each head by itself) or as many as the row (the whole row at once). Tables
    are [max_positions, rotary / 2]; the first `rotary` entries of a head are rotated, in halves.
    """
    prepared = []
    for x, count, weight in ((q, heads, q_norm), (k, kv_heads, k_norm)):
        y = np.array(x, np.float32, order="C")
        _native.prepare_heads(
            y,
            _int32(positions),
            count,
            head_dim,
            _float32(cos),
            _float32(sin),
            _float32(weight),
            norm_epsilon,
        )
        prepared.append(y)
    return prepared[0], prepared[1]


def append_kv(pool: Pool, layer: int, k: F32, v: F32, rows: RaggedRows) -> None:
    """Write new rows' keys and values [R, kv_heads * head_dim] into their pages."""
    if checked_pool(pool).dtype == np.int8:
        _native.append_kv_codes(pool.view(np.int8), layer, _dense(k), _dense(v), *indices(rows))
    else:
        _native.append_kv(pool.view(np.float32), layer, _dense(k), _dense(v), *indices(rows))


def quantized(values: F32) -> NDArray[np.int8]:
    """Keys or values [..., head_dim] as `append_kv` would write them into an int8 pool: [..., head_dim + 4]."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(values / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    return np.concatenate([codes, np.ascontiguousarray(scales, np.float32).view(np.int8)], axis=-1)


def dequantized(pool: Pool) -> F32:
    """What attention reads of a pool, or of pages of one."""
    if pool.dtype == np.float32:
        return pool.astype(np.float32, copy=False)
    head_dim = pool.shape[-1] - SCALE_BYTES
    scales = np.ascontiguousarray(pool[..., head_dim:]).view(np.float32)
    return pool[..., :head_dim].astype(np.float32) * scales


def paged_attention(
    q: F32,
    pool: Pool,
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
    threads: int = 1,
) -> F32:
    """Softmax(scale * q k^T) v over the rows that each row sees: [R, heads * head_dim].

    Row p sees rows j <= p, with `window` > 0 only those with j > p - window; the whole sequence where not `causal`.
    """
    is_codes = checked_pool(pool).dtype == np.int8
    held = pool.shape[5] - (SCALE_BYTES if is_codes else 0)
    if (pool.shape[4], held) != (kv_heads, head_dim):
        raise ValueError(f"the pool holds [{pool.shape[4]}, {held}] a row, not [{kv_heads}, {head_dim}]")
    out = np.empty((len(q), heads * head_dim), np.float32)
    queries, places = _dense(q), indices(rows)
    if is_codes:
        codes = pool.view(np.int8)
        _native.paged_attention_codes(
            queries, codes, layer, *places, out, heads, scale, window, softcap, causal, threads
        )
    else:
        floats = pool.view(np.float32)
        _native.paged_attention(
            queries, floats, layer, *places, out, heads, scale, window, softcap, causal, threads
        )
    return out


def checked_pool(pool: Pool) -> Pool:
    if pool.ndim != 6 or pool.dtype not in (np.float32, np.int8) or not pool.flags.c_contiguous:
        raise ValueError(
            "a pool is contiguous float32 [pages, layers, 2, 32, kv_heads, head_dim], or int8 [..., head_dim + 4]"
        )
    return pool


def _dense(x: F32) -> F32:
    if x.ndim != 2:
        raise ValueError(f"rows have shape [R, width], not {x.shape}")
    return np.ascontiguousarray(x, np.float32)


def _float32(x: F32 | None) -> F32 | None:
    return None if x is None else np.ascontiguousarray(x, np.float32)


def _int32(x: I32) -> I32:
    return np.ascontiguousarray(x, np.int32)


def indices(rows: RaggedRows) -> tuple[I32, I32, I32, I32]:
    if (
        rows.positions.ndim != 1
        or rows.sequence.ndim != 1
        or rows.block_tables.ndim != 2
        or rows.lengths.ndim != 1
    ):
        raise ValueError(
            "ragged rows are positions [R], sequence [R], block_tables [S, blocks] and lengths [S]"
        )
    return _int32(rows.positions), _int32(rows.sequence), _int32(rows.block_tables), _int32(rows.lengths)
