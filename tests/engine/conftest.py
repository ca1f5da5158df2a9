"""Small bundles of every format and an encoder, for the tests of stages."""

from __future__ import annotations

import pytest

from edge_runtime.bundle.bundle import Bundle
from tests.support.stage_contract import MODELS
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: build_tiny_bundle(root / name, model) for name, model in MODELS.items()}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(kind="encoder", qk_norm=False)
    return build_tiny_bundle(tmp_path_factory.mktemp("encoder"), model)
