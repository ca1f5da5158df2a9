"""Experts computed one by one, in any order and as they arrive, give the bits of all at once."""

from __future__ import annotations

import numpy as np
import pytest
from edge_kernels.experts import ExpertWeights, combine, route, run_each, run_experts
from edge_kernels.quantization import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

HIDDEN, INTERMEDIATE, EXPERTS = 72, 40, 6


def experts(format: str) -> ExpertWeights:
    rng = np.random.default_rng(0)
    offsets: dict[str, int] = {}
    packed: list[bytes] = []
    for _ in range(EXPERTS):
        arrays = {}
        for part, shape in {
            "gate": (INTERMEDIATE, HIDDEN),
            "up": (INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }.items():
            weights = rng.normal(size=shape).astype(np.float32)
            if format == "fp32":
                arrays[part] = weights
            else:
                quantized = quantize(weights, format)
                arrays[part], arrays[f"{part}_scales"] = quantized.data, quantized.scales
        end = 0
        for part, array in arrays.items():
            offsets[part] = end
            end += array.nbytes
        packed.append(b"".join(array.tobytes() for array in arrays.values()))
    buffer = np.frombuffer(b"".join(packed), np.uint8)
    return ExpertWeights(buffer, format, EXPERTS, HIDDEN, INTERMEDIATE, len(packed[0]), offsets)


@given(format=st.sampled_from(["fp32", "int8", "int4"]), rows=st.integers(1, 12), data=st.data())
@settings(max_examples=30, deadline=None)
def test_apart_is_the_same_as_at_once(format: str, rows: int, data: st.DataObject) -> None:
    weights = experts(format)
    rng = np.random.default_rng(rows)
    ids, gates = route(
        rng.normal(size=(rows, EXPERTS)).astype(np.float32), top_k=3, normalize=True, softmax_after=False
    )
    x = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
    outputs = np.full((ids.size, HIDDEN), np.nan, np.float32)
    places = data.draw(st.permutations(range(ids.size)))
    cut = data.draw(st.integers(0, ids.size))
    for part in (places[:cut], places[cut:]):
        if part:
            own = np.array(part)
            outputs[own] = run_each(
                x[own // 3], ids.reshape(-1)[own], weights, activation="silu", threads=1 + rows % 3
            )
    wanted = run_experts(x, ids, gates, weights, activation="silu")
    np.testing.assert_array_equal(combine(outputs, gates).view(np.uint32), wanted.view(np.uint32))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="outputs must have a row for each gate"):
        combine(np.zeros((5, 4), np.float32), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="combine needs"):
        combine(np.zeros(6, np.float32), np.zeros((2, 3), np.float32))
