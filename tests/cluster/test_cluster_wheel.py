"""The wheel alone: `edge-runtime demo` in an empty directory, with nothing of the checkout in reach."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


def run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, and the dependencies of ours but not our editable install."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory)]
    # In the usual build directory: kernels that are built already are taken.
    run([*build, str(ROOT)], directory)
    (wheel,) = directory.glob("edge_runtime-*.whl")
    environment = directory / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    run([str(python), "-m", "pip", "install", "-qq", "--no-deps", "--no-index", str(wheel)], directory)
    packages = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], directory)
    # A line in a .pth file adds a directory without running the .pth files inside it: dependencies, not the checkout.
    (Path(packages.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_demo_runs_from_the_wheel_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    where = run([str(installed), "-c", "import edge_runtime; print(edge_runtime.__file__)"], tmp_path)
    assert not where.startswith(str(ROOT))
    stdout = run([str(installed.parent / "edge-runtime"), "demo", "--once", "--json"], tmp_path)
    report = json.loads(stdout.splitlines()[-1])
    assert len({device["pid"] for device in report["devices"]}) == 3
    assert max(device["weight_bytes"] for device in report["devices"]) <= 0.6 * report["model_weight_bytes"]
    assert "def " in report["text"]
    assert list(tmp_path.iterdir()) == []


def test_an_agent_needs_neither_torch_nor_the_coordinators_packages(installed: Path, tmp_path: Path) -> None:
    program = (
        "import sys, edge_runtime.agent.daemon; "
        "print(sorted({'torch', 'transformers', 'onnx', 'jinja2', 'prometheus_client'} & set(sys.modules)))"
    )
    assert run([str(installed), "-c", program], tmp_path).strip() == "[]"
    requires = (
        "import importlib.metadata as m; "
        "print([r for r in m.requires('edge-runtime') if 'extra' not in r and ('torch' in r or 'transformers' in r)])"
    )
    assert run([str(installed), "-c", requires], tmp_path).strip() == "[]"
