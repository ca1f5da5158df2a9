"""Triton's paged attention against plain torch: shapes, windows, caps, chunks; and rows in other company."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from edge_kernels.triton import kernels, reference
from edge_kernels.triton.attention import SPLIT_PAGES
from edge_kernels.triton.shapes import AttentionShape, AttentionWeights, PagedRows
from hypothesis import given
from hypothesis import strategies as st

from tests.support.triton_device import DEVICE, few, products_in_order

SHAPE = AttentionShape(4, 2, 16, 0.25, 0, 0.0, True, 1e-6)


@dataclass(frozen=True)
class Case:
    """Sequences as (first new row, new rows), and what lies in the pool before."""

    shape: AttentionShape
    parts: list[tuple[int, int]]
    pool: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: AttentionWeights
    tables: np.ndarray

    def rows(self, chosen: list[int] | None = None) -> PagedRows:
        chosen = list(range(len(self.parts))) if chosen is None else chosen
        parts = [self.parts[i] for i in chosen]
        positions = [p for base, count in parts for p in range(base, base + count)]
        sequence = [s for s, (_, count) in enumerate(parts) for _ in range(count)]
        lengths = [base + count for base, count in parts]
        starts = np.cumsum([0, *(count for _, count in parts)])
        return PagedRows(
            ints(positions),
            ints(sequence),
            ints(self.tables[chosen]),
            ints(lengths),
            tuple(starts),
            max(lengths),
        )

    def run(self, functions: Any, device: str, chosen: list[int] | None = None) -> torch.Tensor:
        rows = self.rows(chosen)
        starts = self.rows().starts
        wanted = range(len(self.parts)) if chosen is None else chosen
        at = [r for i in wanted for r in range(starts[i], starts[i + 1])]
        tensors = (self.q[at], self.k[at], self.v[at], self.pool.clone())
        q, k, v, pool = (tensor.to(device) for tensor in tensors)
        moved = PagedRows(
            rows.positions.to(device),
            rows.sequence.to(device),
            rows.block_tables.to(device),
            rows.lengths.to(device),
            rows.starts,
            rows.longest,
        )
        weights = AttentionWeights(*(None if w is None else w.to(device) for w in vars_of(self.weights)))
        result: torch.Tensor = functions.attention(q, k, v, pool, 1, moved, self.shape, weights)
        return result.cpu()


def vars_of(weights: AttentionWeights) -> tuple[torch.Tensor | None, ...]:
    return weights.q_norm, weights.k_norm, weights.cos, weights.sin


def ints(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def make(
    shape: AttentionShape,
    parts: list[tuple[int, int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    norm: str = "head",
    rotary: int = 8,
) -> Case:
    rng = np.random.default_rng(seed)

    def random(*dims: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(dims).astype(np.float32))

    count = sum(n for _, n in parts)
    pages = [-(-(base + n) // 32) for base, n in parts]
    tables = np.zeros((len(parts), max(pages)), np.int32)
    free = rng.permutation(sum(pages)).tolist()
    for table, held in zip(tables, pages, strict=True):
        table[:held] = [free.pop() for _ in range(held)]
    pool = random(sum(pages), 2, 2, 32, shape.kv_heads, shape.head_dim).to(dtype)
    widths = {"none": (0, 0), "head": (shape.head_dim,) * 2}
    widths["row"] = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim)
    norms = [1 + 0.1 * random(width) if width else None for width in widths[norm]]
    angles = (
        torch.arange(max(b + n for b, n in parts))[:, None] * 10000.0 ** -torch.linspace(0, 1, rotary)[None]
    )
    tables_of_angles = (angles.cos(), angles.sin()) if rotary else (None, None)
    kv_width = shape.kv_heads * shape.head_dim
    q, k, v = random(count, shape.heads * shape.head_dim), random(count, kv_width), random(count, kv_width)
    return Case(
        shape,
        parts,
        pool,
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        AttentionWeights(*norms, *tables_of_angles),
        tables,
    )


def agree(case: Case, tolerance: float) -> None:
    got, wanted = case.run(kernels, DEVICE), case.run(reference, "cpu")
    assert (got.float() - wanted.float()).abs().max() < tolerance * wanted.float().abs().max()


@given(data=st.data())
@few(5)
def test_agrees_with_torch(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4, 7]))
    head_dim = draw(st.sampled_from([8, 16, 20, 32]))
    causal = draw(st.booleans())
    shape = AttentionShape(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        window=draw(st.sampled_from([0, 1, 5, 40])) if causal else 0,
        softcap=draw(st.sampled_from([0.0, 3.0])),
        causal=causal,
        norm_epsilon=1e-6,
    )
    counts = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    bases = [draw(st.integers(0, 70)) if causal else 0 for _ in counts]
    norm, rotary = (
        draw(st.sampled_from(["none", "head", "row"])),
        draw(st.sampled_from([0, 2, head_dim // 2])),
    )
    case = make(
        shape, list(zip(bases, counts, strict=True)), draw(st.integers(0, 99)), norm=norm, rotary=rotary
    )
    agree(case, 1e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_bfloat16_is_close(window: int) -> None:
    agree(make(replace(SHAPE, window=window), [(40, 1), (0, 20), (63, 3)], dtype=torch.bfloat16), 0.03)


@pytest.mark.parametrize("window", [0, 20, 600])
def test_long_contexts_are_split_by_position(window: int) -> None:
    split = SPLIT_PAGES * 32
    case = make(replace(SHAPE, window=window), [(split - 2, 5), (2 * split + 3, 1), (3, 2)])
    agree(case, 1e-5)


@pytest.mark.export
def test_rows_do_not_depend_on_their_company(monkeypatch: pytest.MonkeyPatch) -> None:
    products_in_order(monkeypatch)
    case = make(replace(SHAPE, window=37), [(0, 12), (511, 3), (64, 1), (30, 9)])
    together = case.run(kernels, DEVICE)
    starts = case.rows().starts
    for i in range(len(case.parts)):
        assert torch.equal(case.run(kernels, DEVICE, [i]), together[starts[i] : starts[i + 1]])


@pytest.mark.export
def test_rows_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed in one piece, or one by one: the pool's pages and the bits are the same."""
    products_in_order(monkeypatch)
    case = make(SHAPE, [(24, 14)])
    whole = case.run(kernels, DEVICE)
    pool, rows = case.pool.clone().to(DEVICE), case.rows()
    weights = AttentionWeights(*(None if w is None else w.to(DEVICE) for w in vars_of(case.weights)))
    for r in range(14):
        one = PagedRows(
            ints([24 + r]).to(DEVICE),
            ints([0]).to(DEVICE),
            rows.block_tables.to(DEVICE),
            ints([24 + r + 1]).to(DEVICE),
            (0, 1),
            24 + r + 1,
        )
        q, k, v = (x[r : r + 1].to(DEVICE) for x in (case.q, case.k, case.v))
        assert torch.equal(kernels.attention(q, k, v, pool, 1, one, SHAPE, weights)[0].cpu(), whole[r])


def test_what_lies_in_unused_slots_does_not_matter() -> None:
    case = make(replace(SHAPE, window=9), [(20, 3), (5, 1)], norm="none", rotary=0)
    wanted = case.run(kernels, DEVICE)
    for s, (base, count) in enumerate(case.parts):
        case.pool[case.tables[s, 0], :, :, base + count :] = torch.nan
    assert torch.equal(case.run(kernels, DEVICE), wanted)


def test_a_pool_of_another_shape_is_refused() -> None:
    case = make(SHAPE, [(0, 1)])
    with pytest.raises(ValueError, match=r"a pool is \[pages, layers, 2, 32, 2, 16\]"):
        replace(case, pool=case.pool[..., :8]).run(kernels, DEVICE)
