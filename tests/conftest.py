"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
