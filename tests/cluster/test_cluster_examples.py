"""Every example runs as it is printed, and says what its text promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMISED = {
    "01_three_devices.py": "tokens/s, finished by",
    "02_same_tokens.py": "the same 48 tokens each time",
    "03_kill_a_device.py": "tokens are those of the undisturbed run",
    "04_openai_client.py": "answers:",
    "05_export_and_plan.py": "layers",
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("[0-9]*.py")} == set(PROMISED)


@pytest.mark.cluster
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert PROMISED[name] in run.stdout
