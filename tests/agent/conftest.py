"""A small bundle for agents, and stages of two with a session open for the tests of their rules."""

from __future__ import annotations

import pytest

from edge_runtime.agent.pipeline_events import COORDINATOR, OpenRows, Received
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.bundle import Bundle
from edge_runtime.core import SessionId
from tests.support.bare_stage import LEASE, OPEN, messages, stage_of
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("agents") / "bundle", TinyModel(layers=3))


@pytest.fixture
def tail() -> PipelineState:
    """Stage 2 of 2 with session 1 open."""
    state = stage_of(1, 2)
    assert state.handle(Received("device-0", OPEN)) == [OpenRows(LEASE, SessionId(1), 6, 3, OPEN.sampling)]
    return state


@pytest.fixture
def first() -> PipelineState:
    """Stage 1 of 2 with session 1 open."""
    state = stage_of(0, 2)
    open_rows, forward = state.handle(Received(COORDINATOR, OPEN))
    assert open_rows == OpenRows(LEASE, SessionId(1), 6, 3, None)
    assert messages([forward]) == [("device-1", OPEN)]
    return state
