"""The demo model as a bundle, once for all tests with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[2] / "examples" / "models" / "moe"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "moe"
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "export",
        str(CHECKPOINT),
        str(path),
        "--weights",
        "int8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return path
