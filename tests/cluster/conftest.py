"""The demo model as a bundle, once for all tests with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "examples" / "models"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("moe", tmp_path_factory)


@pytest.fixture(scope="session")
def demo_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft model of the demo."""
    return exported("draft", tmp_path_factory)


def exported(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / model
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "export",
        str(MODELS / model),
        str(path),
        "--weights",
        "int8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return path
