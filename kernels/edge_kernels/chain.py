"""Programs and the attention between them, compiled to one native call.

A chain gives the bits of its parts run one by one (`run_apart`, its reference): it saves what lies between the calls,
and its threads fetch weights while they wait for each other.

Knows: values by name, arithmetic, pages. Does not know: bundles, blocks, sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels.attention import (
    Pool,
    RaggedRows,
    append_kv,
    checked_pool,
    indices,
    paged_attention,
    prepare_qk,
)
from edge_kernels.program import Program

F32 = NDArray[np.float32]

MAX_ROWS = 128  # of a call


@dataclass(frozen=True, slots=True, eq=False)
class ProgramPart:
    program: Program
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPart:
    """Norm and rotation of queries and keys, keys and values into their pages, attention.

    `inputs` are queries, keys and values; the rest as in `edge_kernels.attention`. `layer` is of the pool.
    """

    inputs: tuple[str, str, str]
    output: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    cos: F32 | None = None
    sin: F32 | None = None
    q_norm: F32 | None = None
    k_norm: F32 | None = None
    norm_epsilon: float = 0.0


Part = ProgramPart | AttentionPart


class Chain:
    """Compiled parts. `run` takes and gives rows; one call at a time."""

    def __init__(self, native: _native.Chain, output_width: int) -> None:
        self._native = native
        self._output_width = output_width

    def run(self, x: F32, pool: Pool, rows: RaggedRows, *, threads: int = 1) -> F32:
        """`x` [R, width], R from 1 to MAX_ROWS. Keys and values of the rows are written into the pool."""
        out = np.empty((len(x), self._output_width), np.float32)
        x = np.ascontiguousarray(x, np.float32)
        if checked_pool(pool).dtype == np.int8:
            self._native.run_codes(x, out, pool.view(np.int8), *indices(rows), threads)
        else:
            self._native.run(x, out, pool.view(np.float32), *indices(rows), threads)
        return out


def compile_chain(parts: Sequence[Part], value: str, width: int) -> Chain:
    """`value` [R, width] comes in, and goes out as what was last assigned to that name."""
    numbers = _Numbers(value, width)
    reads = []
    for part in parts:
        inputs = [numbers.current[name] for name in part.inputs]
        outputs = _outputs(part)
        reads.append((inputs, [numbers.assign(name, size) for name, size in outputs]))
    result = numbers.current[value]
    native = _native.Chain(numbers.widths, result)
    for part, (inputs, made) in zip(parts, reads, strict=True):
        if isinstance(part, ProgramPart):
            native.program(part.program.native, inputs, made)
        else:
            _attention(native, part, [*inputs, *made])
    return Chain(native, numbers.widths[result])


def run_apart(parts: Sequence[Part], value: str, x: F32, pool: Pool, rows: RaggedRows) -> F32:
    """What a chain computes, part by part, on one thread: the reference."""
    values = {value: x}
    for part in parts:
        inputs = [values[name] for name in part.inputs]
        if isinstance(part, ProgramPart):
            values.update(zip(part.outputs, part.program.run(inputs), strict=True))
        else:
            q, k, v = inputs
            values[part.output] = _attend_apart(part, q, k, v, pool, rows)
    return values[value]


def _attend_apart(part: AttentionPart, q: F32, k: F32, v: F32, pool: Pool, rows: RaggedRows) -> F32:
    shape: dict[str, Any] = {"heads": part.heads, "kv_heads": part.kv_heads, "head_dim": part.head_dim}
    tables: dict[str, Any] = {
        "cos": part.cos,
        "sin": part.sin,
        "q_norm": part.q_norm,
        "k_norm": part.k_norm,
    }
    q, k = prepare_qk(q, k, rows.positions, **shape, **tables, norm_epsilon=part.norm_epsilon)
    append_kv(pool, part.layer, k, v, rows)
    rules: dict[str, Any] = {"window": part.window, "softcap": part.softcap, "causal": part.causal}
    return paged_attention(q, pool, part.layer, rows, **shape, scale=part.scale, **rules)


class _Numbers:
    """Two places for each name, in turns: what is read while a name is assigned again stays as it is."""

    def __init__(self, value: str, width: int) -> None:
        self.widths = [width]
        self.current = {value: 0}
        self._places: dict[tuple[str, int], list[int]] = {}

    def assign(self, name: str, width: int) -> int:
        places = self._places.setdefault((name, width), [])
        if len(places) < 2:
            places.append(len(self.widths))
            self.widths.append(width)
        else:
            places.reverse()
        self.current[name] = places[-1]
        return places[-1]


def _outputs(part: Part) -> list[tuple[str, int]]:
    if isinstance(part, ProgramPart):
        return list(zip(part.outputs, part.program.output_widths, strict=True))
    return [(part.output, part.heads * part.head_dim)]


def _attention(native: _native.Chain, part: AttentionPart, values: list[int]) -> None:
    native.attention(
        values,
        part.layer,
        part.heads,
        part.kv_heads,
        part.head_dim,
        part.scale,
        part.window,
        part.softcap,
        part.causal,
        _float32(part.cos),
        _float32(part.sin),
        _float32(part.q_norm),
        _float32(part.k_norm),
        part.norm_epsilon,
    )


def _float32(x: F32 | None) -> F32 | None:
    return None if x is None else np.ascontiguousarray(x, np.float32)
