"""The demo models that ship, for all tests with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.sdk.cluster import demo_bundle as shipped
from edge_runtime.sdk.drafting import shipped_draft


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    return shipped()


@pytest.fixture(scope="session")
def demo_draft() -> Path:
    """The draft model of the demo."""
    return shipped_draft()
