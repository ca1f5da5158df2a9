"""Which executor a device gets, and what an agent without torch is told."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.agent.config import AgentConfig
from edge_runtime.cli.main import main
from edge_runtime.engine import executors
from edge_runtime.engine.torch_stage import available
from edge_runtime.errors import ConfigError, EngineError


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name)
    )


def test_a_device_without_torch_says_what_to_install(without_torch: None) -> None:
    with pytest.raises(EngineError, match="needs torch, which is not installed here") as refused:
        executors.device_executor("torch")
    assert "pip install 'edge-runtime[torch]'" in refused.value.hint


def test_auto_is_torch_only_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "has_cuda", lambda: True)
    assert executors.device_executor("auto") == "torch"
    assert executors.device_executor("native") == "native"
    monkeypatch.setattr(available, "has_cuda", lambda: False)
    assert executors.device_executor("auto") in ("native", "onnx")
    assert executors.device_executor("torch") == "torch"
    assert executors.device_memory_bytes("torch") is None


def test_auto_does_without_torch(without_torch: None) -> None:
    assert not available.has_cuda()
    assert executors.device_executor("auto") in ("native", "onnx")


def test_a_machine_without_a_driver_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not available.has_cuda()


def test_an_executor_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="unknown executor 'gpu'"):
        executors.device_executor("gpu")
    with pytest.raises(ConfigError, match="an executor is one of auto, native, onnx, torch"):
        AgentConfig("a", tmp_path, 1 << 30, 1, executor="gpu")


def test_the_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["agent", "--help"])
    assert "torch" in capsys.readouterr().out
