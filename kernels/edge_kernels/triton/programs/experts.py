"""Mixture of experts: routing a row, and the chosen experts of many rows, grouped.

A *pair* is one row with one of its experts: pair = row * TOP_K + rank. Pairs of one expert are walked in tiles; a tile
reads its expert's weights once for all its rows.
"""

import triton
import triton.language as tl

from edge_kernels.triton.programs.matmul import walk


@triton.jit
def route(
    logits, ids, gates,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, OF_CHOSEN: tl.constexpr,
):  # fmt: skip
    """One row. OF_CHOSEN: gates are divided by the chosen ones' sum, else by all experts' sum."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    inside = i < EXPERTS
    logit = tl.load(logits + row * EXPERTS + i, mask=inside, other=float("-inf")).to(tl.float32)
    usable = tl.abs(logit) < float("inf")
    finite = tl.sum(tl.where(inside & ~usable, 1, 0)) == 0
    key = tl.where(usable, logit, -3e38)  # any expert will do for a row that is broken
    largest = tl.max(key)
    left = key
    total = 0.0
    if not OF_CHOSEN:
        total = tl.sum(tl.where(inside, tl.exp(key - largest), 0.0))
    else:
        for _ in range(TOP_K):
            best = tl.argmax(left, axis=0, tie_break_left=True)
            total += tl.exp(tl.max(left) - largest)
            left = tl.where(i == best, float("-inf"), left)
    left = key
    for rank in range(TOP_K):
        best = tl.argmax(left, axis=0, tie_break_left=True)
        gate = tl.exp(tl.max(left) - largest) / total
        tl.store(ids + row * TOP_K + rank, best)
        tl.store(gates + row * TOP_K + rank, tl.where(finite, gate, float("nan")))
        left = tl.where(i == best, float("-inf"), left)


@triton.jit
def open_up(
    x, buffer, floats, tiles, order, out, hidden, intermediate, stride_bytes,
    gate_at, up_at, gate_scales_at, up_scales_at,
    TOP_K: tl.constexpr, BITS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """silu(gate_proj x) * up_proj x of every pair: `out` [pairs, intermediate]."""
    expert = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    first = tl.load(tiles + 3 * tl.program_id(0) + 1)
    count = tl.load(tiles + 3 * tl.program_id(0) + 2)
    if count > 0:
        m = tl.arange(0, TILE_M)
        live = m < count
        pair = tl.load(order + first + m, mask=live, other=0).to(tl.int64)
        n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        inside = n < intermediate
        x_rows = pair // TOP_K * hidden
        start = expert * stride_bytes
        blocks = tl.cdiv(hidden, 32)
        if BITS == 32:
            gate_data, up_data = floats + (start + gate_at) // 4, floats + (start + up_at) // 4
        else:
            gate_data, up_data = buffer + start + gate_at, buffer + start + up_at
        gate_scales, up_scales = floats + (start + gate_scales_at) // 4, floats + (start + up_scales_at) // 4
        gate = walk(
            x, x_rows, live, gate_data, gate_scales, n, inside, 0, blocks, hidden,
            BITS, TILE_M, TILE_N, DOT, OPERAND,
        )  # fmt: skip
        up = walk(
            x, x_rows, live, up_data, up_scales, n, inside, 0, blocks, hidden, BITS, TILE_M, TILE_N, DOT, OPERAND
        )  # fmt: skip
        inner = gate / (1.0 + tl.exp(-gate)) * up
        target = out + pair[:, None] * intermediate + n[None, :]
        tl.store(target, inner.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def close_down(
    inner, buffer, floats, tiles, order, out, hidden, intermediate, stride_bytes, down_at, down_scales_at,
    BITS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """down_proj of every pair: `out` float32 [pairs, hidden]."""
    expert = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    first = tl.load(tiles + 3 * tl.program_id(0) + 1)
    count = tl.load(tiles + 3 * tl.program_id(0) + 2)
    if count > 0:
        m = tl.arange(0, TILE_M)
        live = m < count
        pair = tl.load(order + first + m, mask=live, other=0).to(tl.int64)
        n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        inside = n < hidden
        start = expert * stride_bytes
        if BITS == 32:  # noqa: SIM108  (pointers of different types)
            data = floats + (start + down_at) // 4
        else:
            data = buffer + start + down_at
        scales = floats + (start + down_scales_at) // 4
        total = walk(
            inner, pair * intermediate, live, data, scales, n, inside, 0, tl.cdiv(intermediate, 32), intermediate,
            BITS, TILE_M, TILE_N, DOT, OPERAND,
        )  # fmt: skip
        tl.store(out + pair[:, None] * hidden + n[None, :], total, mask=live[:, None] & inside[None, :])


@triton.jit
def mix(parts, gates, out, hidden, TOP_K: tl.constexpr, TILE_N: tl.constexpr):
    """One row: its experts' results times their gates, added in gate order."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside = n < hidden
    total = tl.zeros([TILE_N], tl.float32)
    for rank in range(TOP_K):
        pair = row * TOP_K + rank
        total += tl.load(gates + pair) * tl.load(parts + pair * hidden + n, mask=inside, other=0.0)
    tl.store(out + row * hidden + n, total.to(out.dtype.element_ty), mask=inside)
