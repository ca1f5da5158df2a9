"""Attention over 8-bit pages: exactly attention over what the pages hold, and the same bits everywhere."""

from __future__ import annotations

import edge_kernels
import numpy as np
import pytest
from edge_kernels.attention import (
    PAGE_TOKENS,
    SCALE_BYTES,
    RaggedRows,
    append_kv,
    dequantized,
    paged_attention,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def ragged(lengths: list[int], rng: np.random.Generator) -> tuple[RaggedRows, int]:
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    pages = rng.permutation(sum(counts) + 2).tolist()
    tables = np.full((len(lengths), max(counts)), -1, np.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = [pages.pop() for _ in range(count)]
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return RaggedRows(positions, sequence, tables, np.array(lengths, np.int32)), sum(counts) + 2


shapes = st.sampled_from([(4, 2, 32), (8, 1, 64), (6, 3, 20), (2, 2, 4), (5, 5, 128)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    shape=shapes,
    window=st.sampled_from([0, 7, 40]),
    softcap=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_equals_attention_over_what_the_pages_hold_row_by_row(
    isa: str,
    lengths: list[int],
    shape: tuple[int, int, int],
    window: int,
    softcap: float,
    seed: int,
    data: st.DataObject,
) -> None:
    heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    rows, num_pages = ragged(lengths, rng)
    count = len(rows.positions)
    q, k, v = (rng.normal(size=(count, n * head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    pool = np.zeros((num_pages, 2, 2, PAGE_TOKENS, kv_heads, head_dim + SCALE_BYTES), np.int8)
    append_kv(pool, 1, k, v, rows)
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
    options |= {"window": window, "softcap": softcap, "causal": True}
    got = paged_attention(q, pool, 1, rows, **options)
    floats = np.ascontiguousarray(dequantized(pool))
    np.testing.assert_array_equal(got, paged_attention(q, floats, 1, rows, **options))
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    some = RaggedRows(rows.positions[chosen], rows.sequence[chosen], rows.block_tables, rows.lengths)
    threads = data.draw(st.sampled_from([1, 3]))
    np.testing.assert_array_equal(
        paged_attention(q[chosen], pool, 1, some, **options, threads=threads), got[chosen]
    )
    edge_kernels.set_isa("scalar")  # whoever computes, the same bits
    np.testing.assert_array_equal(paged_attention(q, pool, 1, rows, **options), got)
    edge_kernels.set_isa(isa)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), exponent=st.integers(-34, 37), zeros=st.booleans())
def test_codes_are_off_by_half_a_step_at_most(seed: int, exponent: int, zeros: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, num_pages = ragged([40], rng)
    k, v = rng.normal(size=(2, 40, 2 * 16)).astype(np.float32) * np.float32(10.0**exponent)
    if zeros:
        k[3:9] = 0
    pool = np.zeros((num_pages, 1, 2, PAGE_TOKENS, 2, 16 + SCALE_BYTES), np.int8)
    append_kv(pool, 0, k, v, rows)
    floats = dequantized(pool)
    table = rows.block_tables[0]
    for which, x in enumerate((k, v)):
        held = np.stack([floats[table[row // 32], 0, which, row % 32] for row in range(40)])
        wanted = x.reshape(40, 2, 16)
        step = np.abs(wanted).max(axis=2, keepdims=True) / 127
        assert (np.abs(held - wanted) <= step * 0.5001 + 2e-45).all()


def test_what_is_not_finite_shows() -> None:
    rows, num_pages = ragged([2], np.random.default_rng(0))
    k = np.ones((2, 16), np.float32)
    k[1, 3] = np.inf
    pool = np.zeros((num_pages, 1, 2, PAGE_TOKENS, 1, 16 + SCALE_BYTES), np.int8)
    append_kv(pool, 0, k, np.ones((2, 16), np.float32), rows)
    options = {"heads": 1, "kv_heads": 1, "head_dim": 16, "scale": 1.0, "window": 0, "softcap": 0.0}
    out = paged_attention(k, pool, 0, rows, **options, causal=True)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).any()


def test_pools_of_another_shape_or_type_are_refused() -> None:
    rows, num_pages = ragged([2], np.random.default_rng(0))
    k = np.ones((2, 16), np.float32)
    with pytest.raises(ValueError, match="head_dim"):
        append_kv(np.zeros((num_pages, 1, 2, 32, 1, 17), np.int8), 0, k, k, rows)
    with pytest.raises(ValueError, match="pool"):
        append_kv(np.zeros((num_pages, 1, 2, 32, 1, 20), np.int16), 0, k, k, rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_heads"):
        append_kv(np.zeros((num_pages, 1, 2, 32, 2, 20), np.int8), 0, k, k, rows)
