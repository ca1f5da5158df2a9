"""Rounding that makes up for its errors, against plain rounding with the same layout."""

from __future__ import annotations

import numpy as np
import pytest
from edge_kernels.error_feedback import STRETCH, ErrorFeedback, quantize_with_feedback
from edge_kernels.quantization import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def correlated(rows: int, columns: int, seed: int, directions: int = 12) -> Floats:
    """Inputs of a few directions and a little noise, as those of layers are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, directions)) @ rng.normal(size=(directions, columns))
    return (mixed + 0.3 * rng.normal(size=(rows, columns))).astype(np.float32)


def feedback_of(inputs: Floats) -> ErrorFeedback:
    return ErrorFeedback.of(inputs, np.square(inputs).mean(axis=0) + np.float32(1e-6))


def output_error(weights: Floats, rounded: Floats, inputs: Floats) -> float:
    exact = inputs @ weights.T
    return float(np.linalg.norm(inputs @ rounded.T - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("columns", [96, 200, STRETCH + 40])
def test_outputs_are_nearer_on_inputs_that_were_not_seen(columns: int) -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(64, columns)).astype(np.float32)
    every = correlated(1200, columns, 2)
    seen, unseen = every[:800], every[800:]
    feedback = feedback_of(seen)
    found = quantize_with_feedback(weights, feedback)
    plain = quantize(weights, "int4", importance=feedback.importance)
    assert (found.data.shape, found.scales.shape) == (plain.data.shape, plain.scales.shape)
    errors = [output_error(weights, dequantize(each, "int4", columns), unseen) for each in (found, plain)]
    assert errors[0] < 0.7 * errors[1]


@given(st.integers(1, 5), st.integers(1, 130), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_each_rounded_column_moves_the_ones_behind_it(
    rows: int, columns: int, samples: int, seed: int
) -> None:
    """The definition, in float64: each code is the nearest to what is wanted when its turn comes."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(rows, columns)).astype(np.float32)
    inputs = rng.normal(size=(samples, columns)).astype(np.float32)
    feedback = ErrorFeedback.of(inputs, np.ones(columns, np.float32))
    found = dequantize(quantized := quantize_with_feedback(weights, feedback), "int4", columns)
    factor, wanted = feedback.factors[0].astype(np.float64), weights.astype(np.float64)
    for column in range(columns):
        scale = quantized.scales[:, column // 32].astype(np.float64)
        lowest, highest = np.sort([-8 * scale, 7 * scale], axis=0)
        error = wanted[:, column] - found[:, column]
        is_clipped = (wanted[:, column] < lowest) | (wanted[:, column] > highest)
        assert ((np.abs(error) <= 0.5001 * np.abs(scale) + 1e-4) | is_clipped).all()
        wanted[:, column + 1 :] -= np.outer(error / factor[column, column], factor[column, column + 1 :])


def test_columns_that_have_nothing_to_do_with_each_other_are_rounded_for_themselves() -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(16, 64)).astype(np.float32)
    importance = rng.uniform(0.5, 2, 64).astype(np.float32)
    feedback = ErrorFeedback.of(np.zeros((0, 64), np.float32), importance)
    found = quantize_with_feedback(weights, feedback)
    plain = quantize(weights, "int4", importance=importance)
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-5)
    values = dequantize(found, "int4", 64)
    scales = np.abs(found.scales.repeat(32, axis=1))
    inside = np.abs(weights) < 7 * scales
    assert (np.abs(values - weights)[inside] <= 0.5001 * scales[inside]).all()


def test_rows_are_rounded_alike_alone_and_together() -> None:
    weights = np.random.default_rng(4).normal(size=(24, 160)).astype(np.float32)
    feedback = feedback_of(correlated(300, 160, 5))
    whole = dequantize(quantize_with_feedback(weights, feedback), "int4", 160)
    pieces = [
        dequantize(quantize_with_feedback(weights[i : i + 8], feedback), "int4", 160) for i in (0, 8, 16)
    ]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "importance"),
    [
        (np.zeros(32), np.ones(32)),
        (np.zeros((2, 32)), np.ones(31)),
        (np.zeros((2, 32)), np.zeros(32)),
    ],
)
def test_inputs_of_another_shape_are_refused(inputs: Floats, importance: Floats) -> None:
    with pytest.raises(ValueError, match="error feedback needs"):
        ErrorFeedback.of(inputs.astype(np.float32), importance.astype(np.float32))


@pytest.mark.parametrize("weights", [np.ones((2, 31)), np.full((2, 32), np.nan), np.ones((0, 32))])
def test_what_can_not_be_quantized_is_refused(weights: Floats) -> None:
    feedback = ErrorFeedback.of(np.zeros((0, 32), np.float32), np.ones(32, np.float32))
    with pytest.raises(ValueError, match=r"quantize needs|importance needs"):
        quantize_with_feedback(weights.astype(np.float32), feedback)
