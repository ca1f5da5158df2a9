"""What an executor must do: hold some blocks of a bundle and run ragged batches of rows through them.

Knows: the Stage interface and the batch it takes. Does not know: links, leases, sampling, or who calls it.
Shapes: R rows of all spans together, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.side_rows import NO_SIDES, SideRows

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive new rows of one session: rows base_row .. base_row + len(ids) - 1, a chain, and `sides` beside it.

    `logit_rows` counts the rows at the end of the chain whose logits the tail wants (0: none, a prefill chunk); it
    wants those of every side row. Side rows see the chain up to where they leave it, and are forgotten after the batch.
    """

    session: SessionId
    base_row: int
    ids: tuple[int, ...]
    logit_rows: int = 0
    causal: bool = True
    sides: SideRows = NO_SIDES

    @property
    def row_count(self) -> int:
        return len(self.ids) + len(self.sides)


@dataclass(frozen=True, slots=True)
class Batch:
    """A ragged batch: spans of different sessions, at most one span each. `hidden` is None at the first stage.

    Rows are in span order, of each span the chain's first, then its side rows; results likewise.
    """

    spans: tuple[Span, ...]
    hidden: Rows | None  # [R, E]


@dataclass(frozen=True, slots=True)
class StageFormats:
    """How a plan wants numbers kept: part of a stage's numeric class."""

    kv: str = "fp32"  # keys and values in memory: fp32 or int8
    wire: str = "fp32"  # rows between layers (`wire.py`): fp32, fp16 or int8


DEFAULT_FORMATS = StageFormats()
KV_FORMATS = ("fp32", "int8")


class Stage(Protocol):
    """Blocks of one bundle, ready to run. Not thread-safe: one compute thread calls it.

    Row r of a result depends on row r's session history alone, bit for bit, whatever else is in the batch
    (where `row_invariant`).
    """

    layers: LayerRange
    numeric_class: str
    weight_bytes: int

    @property
    def kv_capacity_tokens(self) -> int: ...

    @property
    def kv_used_tokens(self) -> int:
        """Reserved by open sessions, in whole pages: capacity minus this is what `open` can still give."""
        ...

    @property
    def spare_pages(self) -> int:
        """Pages of KV that nobody holds: what a batch may take, for side rows too. 0 where side rows can't be run."""
        ...

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        """Reserve KV for `max_rows`. Raises CapacityError.

        `page_names`: what the leading pages of this session are to be called once they are full. Returns the ids of
        the rows that are here already, in pages of these names from other sessions; () where nothing is kept.
        """
        ...

    def run(self, batch: Batch) -> Rows:
        """Inner stage: [R, E]. Tail of a generator: logits [sum of logit_rows and side rows, V], in span order.

        Tail of an encoder: one pooled vector [E] per span. Each span must start at most at the session's row count;
        starting below it drops the rows after (a new parent was chosen).
        """
        ...

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        """Forget rows from `from_row` on; 0 closes the session and frees its pages. Unknown sessions are ignored."""
        ...

    def keep(
        self, session: SessionId, first_page: int, page_names: Sequence[bytes], ids: Sequence[int]
    ) -> None:
        """Name full pages from `first_page` on, as far as they hold rows of exactly these ids. Before `drop`."""
        ...

    def give_back(self, *, all_pages: bool = False) -> None:
        """Free named pages that no session has used since before the last call, or all that none uses now."""
        ...

    def close(self) -> None: ...


def total_rows(spans: Sequence[Span]) -> int:
    return sum(span.row_count for span in spans)
