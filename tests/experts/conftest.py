"""What tests of experts on flash share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_runtime.bundle import hashing
from edge_runtime.experts import reader
from tests.experts.nested_experts import PIECE_BYTES


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    """So that the small experts of tests come in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (hashing, reader):
            patch.setattr(module, "EXPERT_PIECE_BYTES", PIECE_BYTES)
        yield
