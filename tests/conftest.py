"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports Triton: without a GPU its programs run on the CPU, in its interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.support")  # so that a failure there shows its values

TinyCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint("llama")`: a random checkpoint made by transformers, once a session. Needs the export marker."""
    from tests.support import tiny_checkpoints

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoints.build(family, tmp_path_factory.mktemp(family) / family)
        return made[family]

    return make
