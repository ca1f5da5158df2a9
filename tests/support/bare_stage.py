"""A bare PipelineState with a plan and a session in it, and its instructions in short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    Ignore,
    Instruction,
    Load,
    Loaded,
    Received,
    RunRows,
    Send,
    Work,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.core import SamplingParams
from edge_runtime.protocol.messages import FrameRows, LoadStage, OpenSession, StageReady

LEASE = 7
ROWS = np.zeros((1, 2), np.float32)
OPEN = OpenSession(1, LEASE, 3, 3, 6, (9,), SamplingParams(), "sampler")
POOL = replace(OPEN, tail="pooler", max_rows=3)


def order(stage: int, stages: int, lease: int = LEASE, chunk: int = 2) -> LoadStage:
    devices = tuple(f"device-{i}" for i in range(stages))
    return LoadStage(lease, "sha256:0", stage, devices, stage, stage, chunk)


def loaded(lease: int = LEASE) -> Loaded:
    return Loaded(lease, "class", True, 10, 100, 50)


def stage_of(stage: int, stages: int) -> PipelineState:
    state = PipelineState()
    assert state.handle(Received(COORDINATOR, order(stage, stages))) == [Load(order(stage, stages))]
    assert messages(state.handle(loaded())) == [(COORDINATOR, StageReady(LEASE, "class", True, 10, 100))]
    return state


def messages(instructions: Sequence[Instruction]) -> list[tuple[str, object]]:
    return [(i.to, i.message) for i in instructions if isinstance(i, Send)]


def works(instructions: Sequence[Instruction]) -> list[Work]:
    return [i.work for i in instructions if isinstance(i, RunRows)]


def ignored(instructions: Sequence[Instruction]) -> bool:
    return all(isinstance(i, Ignore) for i in instructions)


def frame(base_row: int = 0, ids: tuple[int, ...] = (4,), seq: int = 1, **changes: object) -> FrameRows:
    parents = tuple(range(base_row - 1, base_row + len(ids) - 1))
    return replace(FrameRows(1, LEASE, 0, seq, base_row, parents, ids, False), **changes)


def arrives(message: FrameRows, source: str = "device-0") -> Received:
    return Received(source, message, np.zeros((len(message.ids), 2), np.float32))
