"""Paged attention: equal to the reference, and each row the same bits in any batch, on any thread count and ISA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import edge_kernels
import numpy as np
import pytest
from edge_kernels import reference
from edge_kernels.attention import PAGE_TOKENS, RaggedRows, append_kv, paged_attention, prepare_qk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@dataclass
class Case:
    """Sequences written to a pool whose unused slots are NaN: reading one shows."""

    q: F32
    pool: F32
    rows: RaggedRows
    settings: dict[str, Any]

    def run(self, chosen: NDArray[np.int64] | None = None, threads: int = 1) -> F32:
        chosen = np.arange(len(self.q)) if chosen is None else chosen
        r = self.rows
        rows = RaggedRows(r.positions[chosen], r.sequence[chosen], r.block_tables, r.lengths)
        return paged_attention(self.q[chosen], self.pool, 1, rows, **self.settings, threads=threads)


def make_case(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    num_pages = sum(counts) + 2
    pages = rng.permutation(num_pages).tolist()
    tables = np.full((len(lengths), max(counts) + 1), -1, np.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = [pages.pop() for _ in range(count)]
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    rows = RaggedRows(positions, sequence, tables, np.array(lengths, np.int32))
    q, k, v = (
        rng.normal(size=(len(positions), n * head_dim)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    pool = np.full((num_pages, 2, 2, PAGE_TOKENS, kv_heads, head_dim), np.nan, np.float32)
    append_kv(pool, 1, k, v, rows)
    return Case(
        q,
        pool,
        rows,
        {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "window": window,
            "softcap": softcap,
            "causal": causal,
        },
    )


cases = st.builds(
    lambda lengths, group, kv_heads, quarter, **rest: make_case(
        lengths, heads=group * kv_heads, kv_heads=kv_heads, head_dim=4 * quarter, **rest
    ),
    st.lists(st.integers(1, 75), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4, 8, 9, 16, 20, 64]),
    window=st.sampled_from([0, 0, 1, 9, 40]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    causal=st.sampled_from([True, True, False]),
    seed=st.integers(0, 1000),
)


@given(case=cases)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_reference(isa: str, case: Case) -> None:
    expected = reference.paged_attention(case.q, case.pool, 1, case.rows, **case.settings)
    np.testing.assert_allclose(case.run(), expected, rtol=1e-4, atol=5e-6)


@given(case=cases, data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_bits_in_any_batch(isa: str, case: Case, data: st.DataObject) -> None:
    whole = case.run()
    some = st.lists(st.integers(0, len(case.q) - 1), min_size=1, max_size=40)  # any order, repeats too
    chosen = np.array(data.draw(some))
    np.testing.assert_array_equal(case.run(chosen), whole[chosen])
    np.testing.assert_array_equal(case.run(chosen[:1]), whole[chosen[:1]])


@given(case=cases)
@settings(max_examples=15, deadline=None)
def test_every_instruction_set_gives_the_same_bits(case: Case) -> None:
    results = []
    for name in edge_kernels.available_isas():
        edge_kernels.set_isa(name)
        results.append(case.run())
    edge_kernels.set_isa(edge_kernels.available_isas()[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_threads_do_not_change_bits(isa: str) -> None:
    case = make_case([300, 170], heads=8, kv_heads=2, head_dim=64)  # enough work for several threads
    alone = case.run()
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(case.run(threads=threads), alone)


def test_where_pages_lie_does_not_matter() -> None:
    one = make_case([70], seed=5)
    moved = make_case([70], seed=5)
    order = np.random.default_rng(1).permutation(len(one.pool))
    moved.pool = np.ascontiguousarray(one.pool[order])
    inverse = np.argsort(order).astype(np.int32)
    tables = one.rows.block_tables
    moved.rows = RaggedRows(
        one.rows.positions, one.rows.sequence, np.where(tables >= 0, inverse[tables], -1), one.rows.lengths
    )
    np.testing.assert_array_equal(one.run(), moved.run())


def test_later_rows_of_the_page_do_not_matter() -> None:
    """A decode step's page is partly empty; the same page in a re-run may hold what a dropped branch wrote."""
    case = make_case([50])
    before = case.run(np.array([40]))
    page = case.rows.block_tables[0, 1]
    case.pool[page, 1, :, 41 - 32 :] = np.inf
    np.testing.assert_array_equal(case.run(np.array([40])), before)


def test_many_query_heads_share_one_key_head(isa: str) -> None:
    case = make_case([40], heads=71, kv_heads=1, head_dim=8)  # more heads than one tile takes
    expected = reference.paged_attention(case.q, case.pool, 1, case.rows, **case.settings)
    np.testing.assert_allclose(case.run(), expected, rtol=1e-4, atol=5e-6)


def test_pages_before_a_window_may_be_gone() -> None:
    case = make_case([100], window=10)
    expected = case.run(np.array([99]))
    case.rows.block_tables[0, :2] = -1
    np.testing.assert_array_equal(case.run(np.array([99])), expected)


def test_large_scores_stay_finite(isa: str) -> None:
    case = make_case([33])
    case.q *= 1e4
    assert np.isfinite(case.run()).all()


def test_a_broken_row_shows_and_spares_its_neighbours(isa: str) -> None:
    case = make_case([20])
    whole = case.run()
    case.q[7, 0] = np.nan
    broken = case.run()
    assert np.isnan(broken[7]).any()
    np.testing.assert_array_equal(np.delete(broken, 7, 0), np.delete(whole, 7, 0))


def refused(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.run()


def test_bad_input_is_refused() -> None:
    case = make_case([40])
    case.rows.block_tables[0, 1] = 99
    refused(case, "outside the pool")
    case = make_case([40])
    case.rows.positions[3] = 40
    refused(case, "outside its sequence")
    case = make_case([40])
    case.rows.sequence[3] = 1
    refused(case, "no sequence")
    case = make_case([40])
    case.rows.lengths[0] = 1000
    refused(case, "longer than its block table")
    case = make_case([40])
    case.settings["heads"] = 3
    refused(case, "multiple")
    case = make_case([40])
    case.pool = case.pool.astype(np.float64)  # type: ignore[assignment]
    refused(case, "contiguous float32")
    case = make_case([40])
    case.settings["window"] = -1
    refused(case, "window")
    with pytest.raises(ValueError, match="no such layer"):
        append_kv(make_case([3]).pool, 2, np.zeros((3, 64)), np.zeros((3, 64)), make_case([3]).rows)


@given(
    rows=st.integers(1, 6),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 20, 64]),
    norm=st.sampled_from(["none", "head", "row"]),
    rotary=st.sampled_from([0, 2, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_prepared_queries_equal_the_reference(
    rows: int, heads: int, kv_heads: int, head_dim: int, norm: str, rotary: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(rows, n * head_dim)).astype(np.float32) for n in (heads, kv_heads))
    positions = rng.integers(0, 50, rows).astype(np.int32)
    angles = rng.normal(size=(50, rotary // 2)) * 3
    widths = {"none": None, "head": (head_dim, head_dim), "row": (heads * head_dim, kv_heads * head_dim)}[
        norm
    ]
    tables = [f(angles).astype(np.float32) if rotary else None for f in (np.cos, np.sin)]
    norms = [rng.normal(size=n).astype(np.float32) for n in widths] if widths else [None, None]
    settings_ = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "cos": tables[0],
        "sin": tables[1],
        "q_norm": norms[0],
        "k_norm": norms[1],
        "norm_epsilon": 1e-6,
    }
    before = q.copy()
    got = prepare_qk(q, k, positions, **settings_)
    expected = reference.prepare_qk(q, k, positions, **settings_)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(q, before)  # the caller's rows stay as they were
    alone = prepare_qk(q[-1:], k[-1:], positions[-1:], **settings_)
    np.testing.assert_array_equal(alone[0][0], got[0][-1])
    np.testing.assert_array_equal(alone[1][0], got[1][-1])


def test_a_position_outside_the_rotary_tables_is_refused() -> None:
    x, table = np.zeros((1, 8), np.float32), np.zeros((5, 4), np.float32)
    with pytest.raises(ValueError, match="outside the rotary tables"):
        prepare_qk(
            x, x, np.array([5], np.int32), heads=1, kv_heads=1, head_dim=8, cos=table, sin=table,
            q_norm=None, k_norm=None, norm_epsilon=1e-6,
        )  # fmt: skip
