"""Chains: the bits of their parts run one by one, on every path, thread count and batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from edge_kernels.attention import PAGE_TOKENS, Pool, RaggedRows
from edge_kernels.chain import MAX_ROWS, AttentionPart, Chain, Part, ProgramPart, compile_chain, run_apart
from edge_kernels.linear import PackedMatrix, pack, pack_fp32
from edge_kernels.program import Step, compile_program
from edge_kernels.quantization import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

F32 = NDArray[np.float32]
LAYERS = 3


def matrix(rng: np.random.Generator, format: str, outputs: int, columns: int) -> PackedMatrix:
    weights = (rng.standard_normal((outputs, columns)) / np.sqrt(columns)).astype(np.float32)
    if format == "fp32":
        return pack_fp32(weights)
    quantized = quantize(weights, format, search=False)
    return pack(quantized.data, quantized.scales, columns)


def layers(
    format: str,
    *,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    with_norms: bool = False,
) -> list[Part]:
    """What a decoder of a few layers computes, with windows and soft caps that differ from layer to layer."""
    rng = np.random.default_rng(7)
    angles = np.outer(np.arange(4 * PAGE_TOKENS), 0.9 ** np.arange(head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    norm = (1 + rng.standard_normal(head_dim) / 10).astype(np.float32)
    parts: list[Part] = []
    for layer in range(LAYERS):
        q, k, v, o, gate, up, down = (
            matrix(rng, format, outputs, columns)
            for outputs, columns in (
                (heads * head_dim, width),
                (kv_heads * head_dim, width),
                (kv_heads * head_dim, width),
                (width, heads * head_dim),
                (2 * width, width),
                (2 * width, width),
                (width, 2 * width),
            )
        )
        ones = np.ones(width, np.float32)
        before = [
            Step("rms_norm", ("hidden",), "n", weight=ones, parameter=1e-5),
            Step("linear", ("n",), "q", matrix=q),
            Step("linear", ("n",), "k", matrix=k),
            Step("linear", ("n",), "v", matrix=v),
        ]
        after = [
            Step("linear", ("attended",), "o", matrix=o),
            Step("add", ("hidden", "o"), "hidden"),
            Step("rms_norm", ("hidden",), "n", weight=ones, parameter=1e-5),
            Step("linear", ("n",), "g", matrix=gate),
            Step("linear", ("n",), "u", matrix=up),
            Step("silu", ("g",), "s"),
            Step("mul", ("s", "u"), "m"),
            Step("linear", ("m",), "d", matrix=down),
            Step("add", ("hidden", "d"), "hidden"),
        ]
        parts += [
            ProgramPart(
                compile_program(before, {"hidden": width}, ("q", "k", "v")), ("hidden",), ("q", "k", "v")
            ),
            AttentionPart(
                ("q", "k", "v"),
                "attended",
                layer,
                heads,
                kv_heads,
                head_dim,
                head_dim**-0.5,
                window=layer * 20,
                softcap=5.0 * layer,
                cos=cos if layer != 1 else None,
                sin=sin if layer != 1 else None,
                q_norm=norm if with_norms else None,
                k_norm=norm if with_norms else None,
                norm_epsilon=1e-6,
            ),
            ProgramPart(
                compile_program(after, {"hidden": width, "attended": heads * head_dim}, ("hidden",)),
                ("hidden", "attended"),
                ("hidden",),
            ),
        ]
    return parts


def rows_of(spans: Sequence[tuple[int, int]]) -> RaggedRows:
    """(first row, rows) of each sequence, each with pages of its own."""
    positions = [np.arange(first, first + count, dtype=np.int32) for first, count in spans]
    lengths = np.array([first + count for first, count in spans], np.int32)
    blocks = max(-(-int(length) // PAGE_TOKENS) for length in lengths)
    tables = np.arange(len(spans) * blocks, dtype=np.int32).reshape(len(spans), blocks)
    sequence = np.repeat(np.arange(len(spans), dtype=np.int32), [count for _, count in spans])
    return RaggedRows(np.concatenate(positions), sequence, tables, lengths)


def pool_for(rows: RaggedRows, *, is_codes: bool = False, kv_heads: int = 2, head_dim: int = 16) -> Pool:
    shape = (rows.block_tables.size, LAYERS, 2, PAGE_TOKENS, kv_heads)
    values = np.random.default_rng(3).standard_normal((*shape, head_dim)).astype(np.float32)
    if not is_codes:
        return values
    scales = np.full((*shape, 1), 0.02, np.float32).view(np.int8)
    return np.concatenate([(values * 40).clip(-127, 127).astype(np.int8), scales], axis=-1)


def both(
    parts: Sequence[Part], chain: Chain, rows: RaggedRows, threads: int, *, is_codes: bool = False
) -> None:
    x = np.random.default_rng(5).standard_normal((len(rows.positions), 64)).astype(np.float32)
    apart_pool, chain_pool = pool_for(rows, is_codes=is_codes), pool_for(rows, is_codes=is_codes)
    expected = run_apart(parts, "hidden", x, apart_pool, rows)
    found = chain.run(x, chain_pool, rows, threads=threads)
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)
    assert np.array_equal(chain_pool, apart_pool)


@pytest.mark.parametrize("is_codes", [False, True])
@pytest.mark.parametrize("format", ["int4", "int8", "fp32"])
def test_a_chain_has_the_bits_of_its_parts(isa: str, format: str, is_codes: bool) -> None:
    parts = layers(format, with_norms=True)
    chain = compile_chain(parts, "hidden", 64)
    for spans in ([(0, 1)], [(40, 1), (7, 1), (63, 1)], [(0, 33), (50, 4), (31, 2)]):
        for threads in (1, 2, 3):
            both(parts, chain, rows_of(spans), threads, is_codes=is_codes)


PARTS = layers("int4")
CHAIN = compile_chain(PARTS, "hidden", 64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=4),
    threads=st.integers(1, 4),
)
def test_any_batch_has_the_bits_of_its_parts(spans: list[tuple[int, int]], threads: int) -> None:
    both(PARTS, CHAIN, rows_of(spans), threads)


def test_helpers_take_part_and_change_no_bit(isa: str) -> None:
    """Matrices large enough for a second thread, many steps: threads meet at every phase in every order."""
    rng = np.random.default_rng(1)
    width = 1024
    steps = [
        Step("linear", ("hidden",), "a", matrix=matrix(rng, "int4", width, width)),
        Step("linear", ("a",), "b", matrix=matrix(rng, "int4", width, width)),
        Step("add", ("hidden", "b"), "hidden"),
    ]
    parts: list[Part] = [
        ProgramPart(compile_program(steps, {"hidden": width}, ("hidden",)), ("hidden",), ("hidden",))
    ] * LAYERS
    chain = compile_chain(parts, "hidden", width)
    rows = rows_of([(0, 1)])
    pool = pool_for(rows)
    x = rng.standard_normal((1, width)).astype(np.float32)
    expected = run_apart(parts, "hidden", x, pool, rows)
    for threads in (1, 2, 3, 8):
        for _ in range(10):
            assert np.array_equal(chain.run(x, pool, rows, threads=threads), expected)


def test_what_does_not_fit_is_refused() -> None:
    rows = rows_of([(0, 2)])
    pool = pool_for(rows)
    shallow: Pool = np.ascontiguousarray(pool[:, :1]).astype(np.float32)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="another shape"):
        CHAIN.run(np.zeros((2, 65), np.float32), pool, rows)
    with pytest.raises(ValueError, match="another shape"):
        CHAIN.run(np.zeros((3, 64), np.float32), pool, rows)
    with pytest.raises(ValueError, match="keys and values of another shape"):
        CHAIN.run(x, pool_for(rows, head_dim=32), rows)
    with pytest.raises(ValueError, match="no such layer"):
        CHAIN.run(x, shallow, rows)
    outside = RaggedRows(rows.positions, rows.sequence, rows.block_tables + 9, rows.lengths)
    with pytest.raises(ValueError, match="outside the pool"):
        CHAIN.run(x, pool, outside)
    far = rows_of([(5 * PAGE_TOKENS, 1)])
    with pytest.raises(ValueError, match="rotary"):
        CHAIN.run(x[:1], pool_for(far), far)
    many = rows_of([(0, MAX_ROWS), (0, 1)])
    with pytest.raises(ValueError, match="128 rows"):
        CHAIN.run(np.zeros((MAX_ROWS + 1, 64), np.float32), pool_for(many), many)
    with pytest.raises(KeyError):
        compile_chain(PARTS, "other", 64)
    with pytest.raises(ValueError, match="does not fit"):
        compile_chain(PARTS, "hidden", 32)
