"""Fixtures of the kernel tests: run a test on every instruction set this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import edge_kernels
import pytest


@pytest.fixture(params=edge_kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    edge_kernels.set_isa(request.param)
    yield request.param
    edge_kernels.set_isa(edge_kernels.available_isas()[0])
