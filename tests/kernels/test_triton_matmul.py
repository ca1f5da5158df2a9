"""Triton's linear layers and norms against plain torch, and rows against themselves in other company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_kernels.quantization import quantize
from edge_kernels.triton import kernels, reference
from edge_kernels.triton.matmul import splits_of
from edge_kernels.triton.shapes import Matrix
from hypothesis import given
from hypothesis import strategies as st

from tests.support.triton_device import DEVICE, few, products_in_order

TYPES = {"fp32": (torch.float32, 2e-6), "bf16": (torch.bfloat16, 1e-2)}


def matrix(rng: np.random.Generator, format: str, rows: int, columns: int) -> Matrix:
    weights = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    if format == "dense":
        return Matrix(format, torch.from_numpy(weights).to(DEVICE), None, columns)
    made = quantize(weights, format, search=False)
    data, scales = (torch.from_numpy(part).to(DEVICE) for part in (made.data, made.scales))
    return Matrix(format, data, scales, columns)


def rows_of(rng: np.random.Generator, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((count, width)).astype(np.float32)).to(DEVICE, dtype)


def on_cpu(made: Matrix) -> Matrix:
    scales = None if made.scales is None else made.scales.cpu()
    return Matrix(made.format, made.data.cpu(), scales, made.columns)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(
        (got.float().cpu() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6)
    )


@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@pytest.mark.parametrize("type_name", TYPES)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 150), st.integers(1, 100)),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@few(5)
def test_linear_agrees_with_torch(
    format: str, type_name: str, shape: tuple[int, int, int], has_bias: bool, seed: int
) -> None:
    count, rows, columns = shape
    rng = np.random.default_rng(seed)
    dtype, tolerance = TYPES[type_name]
    weight = matrix(rng, format, rows, columns)
    x = rows_of(rng, count, columns, dtype)
    bias = rows_of(rng, 1, rows, torch.float32)[0] if has_bias else None
    got = kernels.linear(x, weight, bias, torch.float32)
    wanted = reference.linear(x.cpu(), on_cpu(weight), None if bias is None else bias.cpu(), torch.float32)
    assert difference(got, wanted) < tolerance


@pytest.mark.export
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
def test_k_is_split_by_the_matrix_alone_and_rows_keep_their_bits(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products_in_order(monkeypatch)
    rng = np.random.default_rng(0)
    weight = matrix(rng, format, 70, 1030)
    assert splits_of(70, 1030) == 4
    x = rows_of(rng, 35, 1030, torch.float32)
    together = kernels.linear(x, weight, None, torch.float32)
    assert difference(together, reference.linear(x.cpu(), on_cpu(weight), None, torch.float32)) < 2e-6
    for row in (0, 9, 34):
        assert torch.equal(kernels.linear(x[row : row + 1], weight, None, torch.float32)[0], together[row])


def test_no_rows_are_no_work() -> None:
    weight = matrix(np.random.default_rng(0), "int4", 8, 64)
    assert kernels.linear(torch.empty((0, 64), device=DEVICE), weight, None, torch.float32).shape == (0, 8)


def test_rows_that_do_not_fit_are_refused() -> None:
    weight = matrix(np.random.default_rng(0), "int4", 8, 64)
    with pytest.raises(ValueError, match="32 entries do not fit a matrix of 64"):
        kernels.linear(torch.zeros((1, 32), device=DEVICE), weight, None, torch.float32)
    with pytest.raises(ValueError, match="no matrix of 65"):
        Matrix("int4", weight.data, weight.scales, 96 + 65 - 96)


@pytest.mark.parametrize("type_name", TYPES)
@given(count=st.integers(1, 6), width=st.integers(1, 200), heads=st.integers(1, 3), seed=st.integers(0, 99))
@few(6)
def test_norms_agree_with_torch(type_name: str, count: int, width: int, heads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype, tolerance = TYPES[type_name]
    x = rows_of(rng, count, width * heads, dtype)
    weight = rows_of(rng, 1, width, torch.float32)[0]
    got = kernels.rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    assert difference(got, reference.rms_norm(x.cpu(), weight.cpu(), 1e-6)) < tolerance
    whole = rows_of(rng, 2, width * heads, torch.float32)
    for bias in (None, whole[1]):
        wanted = reference.layer_norm(x.cpu(), whole[0].cpu(), None if bias is None else bias.cpu(), 1e-5)
        # A row of one entry is all zeros but for rounding.
        assert difference(kernels.layer_norm(x, whole[0], bias, 1e-5), wanted) < tolerance or width == 1
