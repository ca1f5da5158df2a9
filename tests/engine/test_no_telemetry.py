"""An inference runtime that runs on people's own devices must not tell anybody that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
import edge_runtime.engine.onnx
import onnxruntime
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
opened = [os.readlink(link) for link in links if os.path.exists(link)]
print([path for path in opened if "onnxruntime" in path and path.endswith((".db", ".ses"))])
"""


def test_importing_the_engine_opens_no_usage_database(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=home, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[]"
    assert list(tmp_path.rglob("*")) == []
