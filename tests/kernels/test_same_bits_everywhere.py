"""Frozen digests of kernel results: every machine and instruction set must give these bits.

Inputs come from integer arithmetic, so that nothing but the kernels can differ between two machines.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from edge_kernels.attention import PAGE_TOKENS, RaggedRows, append_kv, paged_attention, prepare_qk
from edge_kernels.experts import PARTS, ExpertWeights, route, run_experts
from edge_kernels.linear import linear, pack, pack_fp32
from edge_kernels.program import ROW_KINDS, Step, compile_program
from numpy.typing import NDArray

F32 = NDArray[np.float32]

DIGESTS = {
    "attention": "052a4df1f8e8cf24",
    "prepare": "8a02b1dee8760cc2",
    "route": "e5370497a6b832bc",
    "fp32": "04532b9ea704b362",
    "int8": "2f1b78a56ec50d2e",
    "int4": "6c5cfc321bd9290c",
    "linear": "3f3398c222b700ae",
    "rows": "a05867375c099295",
}


def integers(count: int, salt: int) -> NDArray[np.uint64]:
    """Well-spread 32-bit integers."""
    x = (
        (np.arange(count, dtype=np.uint64) + np.uint64(salt * 7919))
        * np.uint64(2654435761)
        % np.uint64(2**32)
    )
    return (x ^ (x >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)


def values(*shape: int, salt: int) -> F32:
    """Multiples of 2^-15 in [-1, 1): exact in float32."""
    x = integers(int(np.prod(shape)), salt) >> np.uint64(16)
    return ((x.astype(np.float32) - np.float32(32768)) / np.float32(32768)).reshape(shape)


def digest(*arrays: NDArray[np.generic]) -> str:
    h = hashlib.sha256()
    for array in arrays:
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()[:16]


def attention_bits() -> str:
    results = []
    for heads, kv_heads, head_dim, window, softcap, causal in (
        (8, 2, 64, 0, 0.0, True),
        (3, 3, 20, 9, 4.0, True),
        (4, 1, 36, 0, 0.0, False),
    ):
        lengths = np.array([70, 33], np.int32)
        rows = RaggedRows(
            np.concatenate([np.arange(70), np.arange(33)]).astype(np.int32),
            np.repeat(np.arange(2, dtype=np.int32), lengths),
            np.array([[4, 0, 2], [1, 3, -1]], np.int32),
            lengths,
        )
        pool = np.zeros((5, 1, 2, PAGE_TOKENS, kv_heads, head_dim), np.float32)
        k, v = (values(103, kv_heads * head_dim, salt=salt) for salt in (1, 2))
        append_kv(pool, 0, k, v, rows)
        results.append(
            paged_attention(
                values(103, heads * head_dim, salt=3) * 4,
                pool,
                0,
                rows,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                scale=0.25,
                window=window,
                softcap=softcap,
                causal=causal,
            )
        )
    return digest(*results)


def prepare_bits() -> str:
    return digest(
        *prepare_qk(
            values(5, 60, salt=1),
            values(5, 40, salt=2),
            np.array([0, 3, 9, 1, 2], np.int32),
            heads=3,
            kv_heads=2,
            head_dim=20,
            cos=values(10, 8, salt=3),
            sin=values(10, 8, salt=4),
            q_norm=values(20, salt=5),
            k_norm=values(40, salt=6),
            norm_epsilon=1e-6,
        )
    )


def route_bits() -> str:
    logits = values(9, 24, salt=1) * 6
    return digest(
        *route(logits, top_k=4, normalize=True, softmax_after=False),
        *route(logits, top_k=3, normalize=False, softmax_after=False),
    )


def expert_bits(format: str) -> str:
    hidden, intermediate, experts = 100, 150, 3
    names = PARTS if format == "fp32" else PARTS + tuple(f"{part}_scales" for part in PARTS)
    bytes_per_block = {"fp32": 0, "int8": 32, "int4": 16}[format]
    offsets, arrays, stride = {}, {}, 0
    for salt, name in enumerate(names):
        shape = (hidden, intermediate) if name.startswith("down") else (intermediate, hidden)
        blocks = -(-shape[1] // 32)
        if format == "fp32":
            arrays[name] = [values(*shape, salt=10 * e + salt) / np.float32(8) for e in range(experts)]
        elif name in PARTS:
            count = shape[0] * blocks * bytes_per_block
            arrays[name] = [
                (integers(count, 10 * e + salt) >> np.uint64(9)).astype(np.uint8) for e in range(experts)
            ]
        else:
            arrays[name] = [
                values(shape[0], blocks, salt=10 * e + salt) / np.float32(64) for e in range(experts)
            ]
        offsets[name] = stride
        stride += arrays[name][0].nbytes
    buffer = np.zeros(experts * stride, np.uint8)
    for name, per_expert in arrays.items():
        for e, array in enumerate(per_expert):
            start = e * stride + offsets[name]
            buffer[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    weights = ExpertWeights(buffer, format, experts, hidden, intermediate, stride, offsets)
    ids = (integers(22, 5) >> np.uint64(8)).reshape(11, 2) % np.uint64(experts)
    gates = np.abs(values(11, 2, salt=6))
    return digest(
        run_experts(values(11, hidden, salt=7), ids.astype(np.int32), gates, weights, activation="silu")
    )


def linear_bits() -> str:
    """Both quantized formats and fp32, in shapes that fill no tile, block or register."""
    results = []
    for bits, (outputs, columns) in ((4, (70, 100)), (8, (35, 164))):
        blocks = -(-columns // 32)
        data = (integers(outputs * blocks * 4 * bits, bits) >> np.uint64(9)).astype(np.uint8)
        scales = values(outputs, blocks, salt=2) / np.float32(64)
        matrix = pack(data.reshape(outputs, blocks, 4 * bits), scales, columns)
        results.append(linear(values(21, columns, salt=3), matrix, values(outputs, salt=4)))
    results.append(linear(values(21, 100, salt=5), pack_fp32(values(35, 100, salt=6)), values(35, salt=7)))
    return digest(*results)


def row_bits() -> str:
    results = []
    for kind in sorted(ROW_KINDS):
        weight = values(77, salt=1) if kind.endswith("_norm") else None
        parameter = 1e-5 if weight is not None else 3.0
        inputs = ("a", "b") if kind in ("add", "mul") else ("a",)
        step = Step(kind, inputs, "y", weight=weight, parameter=parameter)
        program = compile_program([step], {"a": 77, "b": 77}, ["y"])
        results += program.run([values(9, 77, salt=2) * 6, values(9, 77, salt=3)])
    return digest(*results)


@pytest.mark.parametrize("name", DIGESTS)
def test_bits_are_the_frozen_ones(isa: str, name: str) -> None:
    made = {
        "attention": attention_bits,
        "prepare": prepare_bits,
        "route": route_bits,
        "linear": linear_bits,
        "rows": row_bits,
    }
    assert (made[name]() if name in made else expert_bits(name)) == DIGESTS[name]
