"""What a batch asks for, checked before anything is changed, and laid out as rows.

Knows: spans, sessions' row counts, what may be wrong with a batch. Does not know: weights or how rows are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span, total_rows
from edge_runtime.engine.page_table import PageTable
from edge_runtime.errors import CapacityError, EngineError


@dataclass(frozen=True, slots=True)
class StageShape:
    """Which part of which model a stage is."""

    model: ModelInfo
    layers: LayerRange
    num_layers: int

    def __post_init__(self) -> None:
        if self.layers.last >= self.num_layers:
            raise EngineError(
                f"layers {self.layers} are not all in this model, which has {self.num_layers}",
                hint=f"choose layers between 0 and {self.num_layers - 1}",
            )

    @property
    def is_first(self) -> bool:
        return self.layers.first == 0

    @property
    def is_tail(self) -> bool:
        return self.layers.last == self.num_layers - 1

    @property
    def boundaries(self) -> frozenset[str]:
        """Names of the blocks after which another layer comes: where a model may be cut."""
        last = min(self.layers.last, self.num_layers - 2)
        return frozenset(f"layers.{index}" for index in range(self.layers.first, last + 1))


@dataclass(frozen=True, slots=True)
class WrittenRows:
    """Which rows' keys and values are written where, when a batch has side rows: those that a side row continues once
    more into its own sequence. X rows, sequence by sequence, each in order of positions."""

    index: NDArray[np.intp]  # [X] row of the batch
    positions: NDArray[np.int32]  # [X]
    sequence: NDArray[np.int32]  # [X]
    starts: tuple[
        int, ...
    ]  # one more than there are sequences: sequence s has rows starts[s] .. starts[s + 1] - 1
    own: NDArray[np.intp]  # [R] place of each row of the batch in its own sequence


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of a batch: span i has rows starts[i] .. starts[i + 1] - 1. R rows, S spans, B side rows.

    A sequence is what attention runs over: each span's chain, then each side row with what it continues.
    """

    positions: NDArray[np.int32]  # [R] absolute row number in the session
    sequence: NDArray[np.int32]  # [R] index of the row's sequence
    starts: tuple[int, ...]  # S + 1
    lengths: NDArray[np.int32]  # [S + B] rows of the sequence once the batch is appended
    logit_rows: NDArray[np.intp]  # rows whose logits are wanted, in span order
    written: WrittenRows | None = None  # where there are side rows


def lay_out(spans: Sequence[Span]) -> RowLayout:
    return _lay_out_trees(spans) if any(span.sides for span in spans) else _lay_out_chains(spans)


def _lay_out_chains(spans: Sequence[Span]) -> RowLayout:
    starts: list[int] = [0]
    logit_rows: list[int] = []
    for span in spans:
        end = starts[-1] + len(span.ids)
        logit_rows.extend(range(end - span.logit_rows, end))
        starts.append(end)
    counts = [len(span.ids) for span in spans]
    bases = np.array([span.base_row for span in spans], np.int32)
    sequence = np.repeat(np.arange(len(spans), dtype=np.int32), counts)
    offsets = np.arange(starts[-1], dtype=np.int32) - np.array(starts[:-1], np.int32)[sequence]
    return RowLayout(
        positions=bases[sequence] + offsets,
        sequence=sequence,
        starts=tuple(starts),
        lengths=bases + np.array(counts, np.int32),
        logit_rows=np.array(logit_rows, np.intp),
    )


def _lay_out_trees(spans: Sequence[Span]) -> RowLayout:
    """Row by row: batches with side rows are short."""
    starts, chains, sides = [0], [], []  # of `chains` and `sides`: rows of the batch in each sequence
    positions: list[int] = []
    logit_rows: list[int] = []
    for span in spans:
        first, end = starts[-1], starts[-1] + len(span.ids)
        chains.append(list(range(first, end)))
        for index in range(len(span.sides)):
            left_at, above = span.sides.path(index)
            sides.append(
                [*range(first, first + left_at + 1 - span.base_row), *(end + side for side in above)]
            )
        positions += [*range(span.base_row, span.base_row + len(span.ids)), *span.sides.positions()]
        starts.append(first + span.row_count)
        logit_rows.extend(range(end - span.logit_rows, starts[-1]))
    sequences = [*chains, *sides]
    written = _written(sequences, positions, len(chains))
    return RowLayout(
        positions=np.array(positions, np.int32),
        sequence=written.sequence[written.own],
        starts=tuple(starts),
        lengths=np.array([positions[rows[-1]] + 1 for rows in sequences], np.int32),
        logit_rows=np.array(logit_rows, np.intp),
        written=written,
    )


def _written(sequences: Sequence[Sequence[int]], positions: Sequence[int], chains: int) -> WrittenRows:
    """A row's own sequence is its chain, or the one that ends with it."""
    own = np.zeros(len(positions), np.intp)
    starts = [0]
    for number, rows in enumerate(sequences):
        for place, row in enumerate(rows, starts[-1]):
            if number < chains or row == rows[-1]:
                own[row] = place
        starts.append(starts[-1] + len(rows))
    index = np.array([row for rows in sequences for row in rows], np.intp)
    counts = [len(rows) for rows in sequences]
    return WrittenRows(
        index=index,
        positions=np.array(positions, np.int32)[index],
        sequence=np.repeat(np.arange(len(sequences), dtype=np.int32), counts),
        starts=tuple(starts),
        own=own,
    )


def check_open(shape: StageShape, session: SessionId, max_rows: int) -> None:
    if max_rows > shape.model.max_context_tokens:
        raise CapacityError(
            f"session {session} wants {max_rows} tokens; "
            f"{shape.model.name} was made for at most {shape.model.max_context_tokens}",
            hint="shorten the prompt or ask for fewer new tokens",
        )


def check_batch(batch: Batch, shape: StageShape, table: PageTable) -> None:
    """Raises EngineError or CapacityError that names the session. Changes nothing, so no session is half-run."""
    seen: set[SessionId] = set()
    for span in batch.spans:
        if span.session in seen:
            raise EngineError(f"session {span.session} is in one batch twice")
        seen.add(span.session)
        _check_span(span, shape)
        table.check_append(span.session, span.base_row, len(span.ids))
    _check_hidden(batch, shape)


def _check_span(span: Span, shape: StageShape) -> None:
    if not span.ids:
        raise EngineError(f"session {span.session} has a span without rows")
    if not 0 <= span.logit_rows <= len(span.ids):
        raise EngineError(
            f"session {span.session} wants logits of {span.logit_rows} rows of a span of {len(span.ids)}"
        )
    if shape.model.kind == "encoder" and span.base_row != 0:
        raise EngineError(
            f"session {span.session} starts at row {span.base_row}; an encoder takes a whole sequence at once"
        )
    _check_sides(span, shape)
    if shape.is_first and not all(0 <= token < shape.model.vocab_size for token in span.ids + span.sides.ids):
        raise EngineError(
            f"session {span.session} has a token id outside 0..{shape.model.vocab_size - 1}",
            hint="the ids come from another tokenizer",
        )


def _check_sides(span: Span, shape: StageShape) -> None:
    chain = range(span.base_row - 1, span.base_row + len(span.ids))
    if any(parent >= 0 and parent not in chain for parent in span.sides.parents):
        raise EngineError(f"session {span.session} has a side row that continues no row of its span")
    if span.sides and (shape.model.kind == "encoder" or not span.causal):
        raise EngineError(f"session {span.session} has side rows; a sequence that is read both ways has none")


def _check_hidden(batch: Batch, shape: StageShape) -> None:
    if shape.is_first:
        if batch.hidden is not None:
            raise EngineError("the first stage makes rows from token ids and takes no hidden rows")
        return
    wanted = (total_rows(batch.spans), shape.model.hidden_size)
    if batch.hidden is None:
        raise EngineError(
            f"a stage that starts at layer {shape.layers.first} takes hidden rows, and got none"
        )
    if batch.hidden.shape != wanted or batch.hidden.dtype != np.float32:
        raise EngineError(
            f"hidden rows are {batch.hidden.dtype} {batch.hidden.shape}; float32 {wanted} was announced"
        )
