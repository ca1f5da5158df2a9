"""Running whole models through one or more stages, as tests do it: in one process, without links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Self

import numpy as np

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Rows, Span, Stage

MakeStage = Callable[[Bundle, LayerRange], Stage]


def cut(num_layers: int, *boundaries: int) -> list[LayerRange]:
    """Ranges of a model cut before each of `boundaries`."""
    edges = [0, *boundaries, num_layers]
    return [LayerRange(first, after - 1) for first, after in pairwise(edges)]


class Pipeline:
    """Stages in a row: rows go through all of them."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    @classmethod
    def load(cls, bundle: Bundle, make: MakeStage, *boundaries: int) -> Self:
        return cls([make(bundle, layers) for layers in cut(bundle.manifest.num_layers, *boundaries)])

    def open(self, session: int, max_rows: int) -> None:
        for stage in self.stages:
            stage.open(SessionId(session), max_rows)

    def drop(self, session: int, from_row: int = 0) -> None:
        for stage in self.stages:
            stage.drop(SessionId(session), from_row)

    def run(self, *spans: Span) -> Rows:
        rows: Rows | None = None
        for stage in self.stages:
            rows = stage.run(Batch(tuple(spans), rows))
        assert rows is not None
        return rows


def span(session: int, base_row: int, ids: Sequence[int], logit_rows: int | None = None) -> Span:
    """A span that wants the logits of all its rows unless told otherwise."""
    wanted = len(ids) if logit_rows is None else logit_rows
    return Span(SessionId(session), base_row, tuple(ids), wanted)


def logits_alone(pipeline: Pipeline, session: int, ids: Sequence[int]) -> Rows:
    """[len(ids), V], one row at a time, with nobody else in the batch."""
    pipeline.open(session, len(ids))
    rows = [pipeline.run(span(session, row, [token])) for row, token in enumerate(ids)]
    pipeline.drop(session)
    return np.concatenate(rows)


def without_logits(one: Span) -> Span:
    return replace(one, logit_rows=0)


def ticking(step_seconds: float) -> Callable[[], float]:
    """A clock that goes on by one step at every look, whatever the machine is doing."""
    looks = count()
    return lambda: next(looks) * step_seconds
