"""Attention over paged keys and values, in two launches after rows are prepared.

A program of `attend` takes a tile of rows of one sequence, the query heads that share one key head, and one *split*:
a fixed number of pages on the grid of absolute positions. `combine` merges a row's splits in their order. Pages that a
row does not see leave its running maximum and sums exactly as they were, so tile mates change nothing.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride"])
def prepare(
    q, k, v, q_out, pool, positions, sequence, block_tables, q_norm, k_norm, cos, sin, epsilon,
    table_stride, page_stride, layer_offset, values_offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """One head of one row: norm, rotate; queries to `q_out`, keys and values to their page. HALF 0: not rotated."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row)
    table = tl.load(sequence + row).to(tl.int64) * table_stride
    page = tl.load(block_tables + table + position // PAGE).to(tl.int64)
    slot = page * page_stride + layer_offset + (position % PAGE).to(tl.int64) * (KV_HEADS * D)
    if head < HEADS:
        target = q_out + row * (HEADS * D) + head * D
        source = q + row * (HEADS * D) + head * D
        rotate_head(
            source, target, q_norm, cos, sin, position, epsilon, D, D_PADDED, HALF, HALF_PADDED, HAS_Q_NORM
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        target = pool + slot + (head - HEADS) * D
        source = k + row * (KV_HEADS * D) + (head - HEADS) * D
        rotate_head(
            source, target, k_norm, cos, sin, position, epsilon, D, D_PADDED, HALF, HALF_PADDED, HAS_K_NORM
        )  # fmt: skip
    else:
        i = tl.arange(0, D_PADDED)
        source = v + row * (KV_HEADS * D) + (head - HEADS - KV_HEADS) * D
        value = tl.load(source + i, mask=i < D, other=0.0)
        target = pool + slot + values_offset + (head - HEADS - KV_HEADS) * D
        tl.store(target + i, value.to(pool.dtype.element_ty), mask=i < D)


@triton.jit
def rotate_head(
    source, target, norm, cos, sin, position, epsilon,
    D: tl.constexpr, D_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, D_PADDED)
    inside = i < D
    value = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)
    root = 1.0
    if HAS_NORM:
        root = tl.sqrt(tl.sum(value * value) / D + epsilon)
        value = value / root * tl.load(norm + i, mask=inside, other=0.0)
    tl.store(target + i, value.to(target.dtype.element_ty), mask=inside & (i >= 2 * HALF))
    if HALF > 0:
        j = tl.arange(0, HALF_PADDED)
        paired = j < HALF
        low = tl.load(source + j, mask=paired, other=0.0).to(tl.float32)
        high = tl.load(source + HALF + j, mask=paired, other=0.0).to(tl.float32)
        if HAS_NORM:
            low = low / root * tl.load(norm + j, mask=paired, other=0.0)
            high = high / root * tl.load(norm + HALF + j, mask=paired, other=0.0)
        at = position.to(tl.int64) * HALF
        c = tl.load(cos + at + j, mask=paired, other=0.0)
        s = tl.load(sin + at + j, mask=paired, other=0.0)
        tl.store(target + j, (low * c - high * s).to(target.dtype.element_ty), mask=paired)
        tl.store(target + HALF + j, (high * c + low * s).to(target.dtype.element_ty), mask=paired)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit(do_not_specialize=["splits", "table_stride"])
def attend(
    q, pool, tiles, positions, sequence, block_tables, lengths, sums, stats,
    scale, softcap, window, splits, table_stride, page_stride, layer_offset, values_offset,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, TILE_M: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, PAGE: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Writes of every (row, head, split): the weighted sum of values `sums`, and `stats` (maximum, sum of weights).

    Line i of a tile is row i // GROUP_PADDED of the tile, query head i % GROUP_PADDED of the key head's group.
    """
    first_row = tl.load(tiles + 2 * tl.program_id(0))
    count = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    line = tl.arange(0, TILE_M)
    in_tile = line // GROUP_PADDED
    member = line % GROUP_PADDED
    live = (in_tile < count) & (member < GROUP)
    row = (first_row + in_tile).to(tl.int64)
    position = tl.load(positions + row, mask=live, other=0)
    s = tl.load(sequence + first_row).to(tl.int64)
    if CAUSAL:
        end = tl.load(positions + first_row + count - 1) + 1
        begin = 0
        if window > 0:
            begin = tl.maximum(tl.load(positions + first_row) - window + 1, 0)
    else:
        end = tl.load(lengths + s)
        begin = 0
    first_page = tl.maximum(split * SPLIT_PAGES, begin // PAGE)
    last_page = tl.minimum((split + 1) * SPLIT_PAGES, tl.cdiv(end, PAGE))
    if first_page < last_page:
        d = tl.arange(0, D_PADDED)
        head = kv_head * GROUP + member
        q_at = row * (KV_HEADS * GROUP * D) + head * D
        query = tl.load(q + q_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        query = query.to(OPERAND).to(DOT)
        largest = tl.full([TILE_M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([TILE_M], tl.float32)
        total = tl.zeros([TILE_M, D_PADDED], tl.float32)
        slot = tl.arange(0, PAGE)
        for block in range(first_page, last_page):
            page = tl.load(block_tables + s * table_stride + block).to(tl.int64)
            at = block * PAGE + slot  # [PAGE] absolute positions
            held = at < end  # what lies beyond may be anything
            base = pool + page * page_stride + layer_offset + slot.to(tl.int64) * (KV_HEADS * D) + kv_head * D
            keys = tl.load(base[None, :] + d[:, None], mask=held[None, :] & (d < D)[:, None], other=0.0)
            scores = tl.dot(query, keys.to(OPERAND).to(DOT), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = softcap * tanh(scores / softcap)
            seen = held[None, :] & live[:, None]
            if CAUSAL:
                seen = seen & (at[None, :] <= position[:, None])
                if window > 0:
                    seen = seen & (at[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            reference = tl.where(larger == float("-inf"), 0.0, larger)  # a row that has seen nothing yet
            weights = tl.exp(scores - reference[:, None])
            shrink = tl.exp(largest - reference)
            values = tl.load(
                base[:, None] + values_offset + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0
            )
            weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
            product = tl.dot(weights.to(OPERAND).to(DOT), values.to(OPERAND).to(DOT), input_precision="ieee")
            total = total * shrink[:, None] + product
            largest = larger
        place = (row * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(sums + place[:, None] * D + d[None, :], total, mask=live[:, None] & (d < D)[None, :])
        tl.store(stats + 2 * place, largest, mask=live)
        tl.store(stats + 2 * place + 1, weight_sum, mask=live)


@triton.jit(do_not_specialize=["splits"])
def combine(
    sums, stats, out, positions, sequence, lengths, window, splits,
    HEADS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, SPLIT_TOKENS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One head of one row: only the splits this row sees, whatever else was written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = 0
    if CAUSAL:
        position = tl.load(positions + row)
        last = position // SPLIT_TOKENS
        if window > 0:
            first = tl.maximum(position - window + 1, 0) // SPLIT_TOKENS
    else:
        last = (tl.load(lengths + tl.load(sequence + row)) - 1) // SPLIT_TOKENS
    base = (row * HEADS + head) * splits
    largest = tl.load(stats + 2 * (base + first))
    for split in range(first + 1, last + 1):
        largest = tl.maximum(largest, tl.load(stats + 2 * (base + split)))
    d = tl.arange(0, D_PADDED)
    total = tl.zeros([D_PADDED], tl.float32)
    weight_sum = 0.0
    for split in range(first, last + 1):
        shrink = tl.exp(tl.load(stats + 2 * (base + split)) - largest)
        weight_sum += shrink * tl.load(stats + 2 * (base + split) + 1)
        total += shrink * tl.load(sums + (base + split) * D + d, mask=d < D, other=0.0)
    tl.store(out + (row * HEADS + head) * D + d, (total / weight_sum).to(out.dtype.element_ty), mask=d < D)
