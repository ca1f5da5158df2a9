"""Products with weights straight from a bundle's layout: x [R, K] times a weight [N, K], transposed.

One program makes one tile [TILE_M, TILE_N] of one split of K, walking K in steps of 32. A step of a quantized weight is
a product with whole-number codes, which float32 and bfloat16 hold exactly, times the step's scales: the weight itself
is never rounded.

x loads are masked to K and to the rows of the tile; codes need no mask on K, since a last block is stored whole.
"""

import triton
import triton.language as tl


@triton.jit
def int4_step(x, x_rows, live, data, columns, inside, block, K, DOT: tl.constexpr, OPERAND: tl.constexpr):
    """[TILE_M, TILE_N] of block `block`, before its scale: even entries meet low nibbles, odd ones high nibbles.

    `x_rows` [TILE_M] are offsets of rows in x; `columns` [TILE_N] offsets of rows of codes in `data`.
    """
    j = tl.arange(0, 16)
    bytes_ = tl.load(data + columns[None, :] + block * 16 + j[:, None], mask=inside[None, :], other=136)
    low = ((bytes_ & 15).to(tl.float32) - 8.0).to(OPERAND).to(DOT)
    high = ((bytes_ >> 4).to(tl.float32) - 8.0).to(OPERAND).to(DOT)
    k = block * 32 + 2 * j
    even = tl.load(x + x_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
    odd = tl.load(x + x_rows[:, None] + k[None, :] + 1, mask=live[:, None] & (k + 1 < K)[None, :], other=0.0)
    product = tl.dot(even.to(OPERAND).to(DOT), low, input_precision="ieee")
    return tl.dot(odd.to(OPERAND).to(DOT), high, product, input_precision="ieee")


@triton.jit
def int8_step(x, x_rows, live, data, columns, inside, block, K, DOT: tl.constexpr, OPERAND: tl.constexpr):
    k = block * 32 + tl.arange(0, 32)
    bytes_ = tl.load(data + columns[None, :] + k[:, None], mask=inside[None, :], other=128)
    codes = (bytes_.to(tl.float32) - 128.0).to(OPERAND).to(DOT)
    rows = tl.load(x + x_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
    return tl.dot(rows.to(OPERAND).to(DOT), codes, input_precision="ieee")


@triton.jit
def dense_step(x, x_rows, live, data, columns, inside, block, K, DOT: tl.constexpr, OPERAND: tl.constexpr):
    k = block * 32 + tl.arange(0, 32)
    weights = tl.load(
        data + columns[None, :] + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0
    )
    rows = tl.load(x + x_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
    return tl.dot(rows.to(OPERAND).to(DOT), weights.to(OPERAND).to(DOT), input_precision="ieee")


@triton.jit
def walk(
    x, x_rows, live, data, scales, n, inside, first, last, K,
    BITS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """float32 [TILE_M, TILE_N]: the sum over blocks first .. last - 1, in order. `n` [TILE_N] rows of the weight."""
    blocks = tl.cdiv(K, 32)
    wide = n.to(tl.int64)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for block in range(first, last):
        if BITS == 32:
            total += dense_step(x, x_rows, live, data, wide * K, inside, block, K, DOT, OPERAND)
        else:
            scale = tl.load(scales + wide * blocks + block, mask=inside, other=0.0)
            if BITS == 4:
                columns = wide * blocks * 16
                product = int4_step(x, x_rows, live, data, columns, inside, block, K, DOT, OPERAND)
            else:
                columns = wide * blocks * 32
                product = int8_step(x, x_rows, live, data, columns, inside, block, K, DOT, OPERAND)
            total += product * scale[None, :]
    return total


@triton.jit(do_not_specialize=["R"])
def multiply(
    x, data, scales, bias, out, R, N, K,
    BITS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """`out` is [splits, R, N]: partial sums, or the result itself where there is one split."""
    split = tl.program_id(2)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    live, inside = m < R, n < N
    first = split * SPLIT_BLOCKS
    last = tl.minimum(first + SPLIT_BLOCKS, tl.cdiv(K, 32))
    wide = m.to(tl.int64)
    total = walk(
        x, wide * K, live, data, scales, n, inside, first, last, K, BITS, TILE_M, TILE_N, DOT, OPERAND
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0)[None, :]
    target = out + (split.to(tl.int64) * R + wide)[:, None] * N + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["R"])
def add_splits(
    parts, bias, out, R, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    """One row: the splits' sums, added in their order."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside = n < N
    total = tl.zeros([TILE_N], tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * R + row) * N + n, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=inside)
