"""Attention over a paged KV cache, for ragged batches.

The pool is float32 [num_pages, layers, 2, 32, kv_heads, head_dim] (2: keys, values). Row p of a sequence lies in page
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

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


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


def append_kv(pool: F32, layer: int, k: F32, v: F32, rows: RaggedRows) -> None:
    """Write new rows' keys and values [R, kv_heads * head_dim] into their pages."""
    _native.append_kv(_checked_pool(pool), layer, _dense(k), _dense(v), *_indices(rows))


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
    threads: int = 1,
) -> F32:
    """Softmax(scale * q k^T) v over the rows that each row sees: [R, heads * head_dim].

    Row p sees rows j <= p, with `window` > 0 only those with j > p - window; the whole sequence where not `causal`.
    """
    if _checked_pool(pool).shape[4:] != (kv_heads, head_dim):
        raise ValueError(
            f"the pool holds [{pool.shape[4]}, {pool.shape[5]}] a row, not [{kv_heads}, {head_dim}]"
        )
    out = np.empty((len(q), heads * head_dim), np.float32)
    _native.paged_attention(
        _dense(q), pool, layer, *_indices(rows), out, heads, scale, window, softcap, causal, threads
    )
    return out


def _checked_pool(pool: F32) -> F32:
    if pool.ndim != 6 or pool.dtype != np.float32 or not pool.flags.c_contiguous:
        raise ValueError("a pool is contiguous float32 [pages, layers, 2, 32, kv_heads, head_dim]")
    return pool


def _dense(x: F32) -> F32:
    if x.ndim != 2:
        raise ValueError(f"rows have shape [R, width], not {x.shape}")
    return np.ascontiguousarray(x, np.float32)


def _float32(x: F32 | None) -> F32 | None:
    return None if x is None else np.ascontiguousarray(x, np.float32)


def _int32(x: I32) -> I32:
    return np.ascontiguousarray(x, np.int32)


def _indices(rows: RaggedRows) -> tuple[I32, I32, I32, I32]:
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
