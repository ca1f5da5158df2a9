"""Matrices share reservations of memory: each is right beside others that come and go, and gives its own back."""

from __future__ import annotations

import random
import sys

import numpy as np
import psutil
import pytest
from edge_kernels.linear import PackedMatrix, linear, pack_fp32
from numpy.typing import NDArray

ROWS, COLUMNS = 512, 1024  # 2 MiB each


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def product(matrix: PackedMatrix, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return linear(x, matrix)


def test_what_goes_leaves_the_others_as_they_are() -> None:
    luck = random.Random(5)
    x = np.random.default_rng(5).standard_normal((2, 96), np.float32)
    held: list[tuple[PackedMatrix, NDArray[np.float32]]] = []
    for turn in range(200):
        outputs = luck.randint(1, 400)
        weights = np.random.default_rng(turn).standard_normal((outputs, 96), np.float32)
        held.append((pack_fp32(weights), x @ weights.T))
        if len(held) > 12:
            held.pop(luck.randrange(len(held)))
    for matrix, expected in held:
        np.testing.assert_allclose(product(matrix, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise elsewhere")
def test_memory_goes_back_with_its_matrix() -> None:
    weights = np.ones((ROWS, COLUMNS), np.float32)
    size_bytes = 32 * weights.nbytes
    before = resident_bytes()
    matrices = [pack_fp32(weights) for _ in range(32)]
    loaded = resident_bytes()
    assert loaded - before > 0.9 * size_bytes
    del matrices[:24]
    assert loaded - resident_bytes() > 0.6 * size_bytes
