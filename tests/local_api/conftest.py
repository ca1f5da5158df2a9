"""A coordinator's API on a real socket, and a draft bundle of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_service import TOKENIZER_JSON
from tests.support.served_api import service, url
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

__all__ = ["service", "url"]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "bundle"
    model = TinyModel(layers=2, vocab=256, max_context=128)
    build_tiny_bundle(path, model, TOKENIZER_JSON, "{{ messages[0].content }}").close()
    return path
