"""Native functions answer or raise ValueError, whatever sizes and indices they are given; they never read astray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from edge_kernels import _native
from numpy.typing import NDArray

ROUNDS = 1500
Draw = Callable[[int, int], int]


def attempt(function: Callable[..., Any], *arguments: object) -> bool:
    try:
        function(*arguments)
    except ValueError:
        return False
    return True


def attention_call(rng: np.random.Generator, draw: Draw) -> bool:
    rows, sequences, blocks, pages, kv_heads = draw(0, 6), draw(1, 4), draw(1, 4), draw(1, 5), draw(1, 4)
    heads, head_dim = kv_heads * draw(1, 4), 4 * draw(1, 5)

    def indices(low: int, high: int, *shape: int) -> NDArray[np.int32]:
        slack = int(rng.random() < 0.2)  # now and then one outside
        return rng.integers(low - slack, high + slack, shape).astype(np.int32)

    pool = np.zeros((pages, 2, 2, 32, kv_heads, head_dim), np.float32)
    lengths = indices(1, 32 * blocks + 1, sequences)
    sequence = indices(0, sequences, rows)
    positions = np.array([draw(0, max(1, lengths[s % sequences])) for s in sequence], np.int32) + draw(0, 2)
    where = (positions, sequence, indices(0, pages, sequences, blocks), lengths)
    q, k = (np.zeros((rows, n * head_dim), np.float32) for n in (heads, kv_heads))
    layer, window, causal, threads = draw(0, 3), draw(-1, 50), bool(draw(0, 2)), draw(-1, 4)
    appended = attempt(_native.append_kv, pool, layer, k, k, *where)
    attended = attempt(
        _native.paged_attention,
        q,
        pool,
        layer,
        *where,
        np.empty_like(q),
        heads,
        1.0,
        window,
        0.0,
        causal,
        threads,
    )
    return appended or attended


def experts_call(rng: np.random.Generator, draw: Draw) -> bool:
    format = ("fp32", "int8", "int4")[draw(0, 3)]
    rows, experts, hidden, intermediate, top_k = draw(0, 4), draw(1, 4), draw(1, 70), draw(1, 70), draw(0, 4)
    return attempt(
        _native.run_experts,
        np.zeros((rows, hidden), np.float32),
        rng.integers(0, experts + draw(0, 2), (rows, top_k)).astype(np.int32),
        np.zeros((rows, top_k), np.float32),
        np.zeros(draw(1, 120_000), np.uint8),
        format,
        experts,
        hidden,
        intermediate,
        draw(0, 10_000) * 4,
        np.array([draw(-1, 8000) * 4 for _ in range(3 if format == "fp32" else 6)], np.int64),
        np.empty((rows, hidden), np.float32),
        draw(-1, 4),
    )


def test_any_sizes_and_indices_are_answered_or_refused() -> None:
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    for call in (attention_call, experts_call):
        answered = sum(call(rng, draw) for _ in range(ROUNDS))
        assert 0 < answered < ROUNDS  # both outcomes were tried
