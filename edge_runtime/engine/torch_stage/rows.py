"""A batch's rows on the device: where each lies, sent over in one piece.

Knows: layouts of rows and pages. Does not know: what is computed with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from edge_kernels.triton.shapes import PagedRows
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.engine.base import Span
from edge_runtime.engine.spans import RowLayout, lay_out
from edge_runtime.engine.torch_stage.kv_pages import TorchPages

Ropes = Mapping[str, tuple[Tensor, Tensor]]  # name -> cos and sin [positions, rotary / 2]
_ALIGNED_INTS = 4  # 16 bytes: programs are compiled for pointers so aligned


@dataclass(frozen=True, slots=True)
class TorchContext:
    """What a step may know of the batch. `kv_layer` is the block's first layer in the pool."""

    ids: Tensor  # int64 [R]
    positions: Tensor  # int64 [R]
    layout: RowLayout
    rows: PagedRows
    pool: Tensor
    kv_layer: int
    ropes: Ropes
    repeated: Repeated | None = None  # where there are side rows: `rows` are these


@dataclass(frozen=True, slots=True)
class Repeated:
    """Attention takes each sequence's rows as neighbours, so those that a side row continues run there again."""

    index: Tensor  # int64 [X] row of the batch
    own: Tensor  # int64 [R] place of each row of the batch among these


def torch_context(
    spans: Sequence[Span], pages: TorchPages, ropes: Ropes, sides: Sequence[Sequence[int]] = ()
) -> TorchContext:
    """For spans whose rows `pages` holds already. `sides`: tables of their side rows (`side_pages`)."""
    layout = lay_out(spans)
    written = layout.written
    tables = pages.block_tables([span.session for span in spans], sides)
    ids = np.array([token for span in spans for token in span.ids + span.sides.ids], np.int32)
    starts = layout.starts if written is None else written.starts
    placed = (layout.positions, layout.sequence) if written is None else (written.positions, written.sequence)
    sent = _send((layout.positions, ids, tables, layout.lengths, *placed), pages.tensor.device)
    positions, id_tensor, block_tables, lengths, row_positions, sequence = sent
    longest = int(layout.lengths.max(initial=0))
    rows = PagedRows(row_positions, sequence, block_tables, lengths, starts, longest)
    repeated = None
    if written is not None:
        index, own = _send(
            (written.index.astype(np.int32), written.own.astype(np.int32)), rows.lengths.device
        )
        repeated = Repeated(index.long(), own.long())
    return TorchContext(id_tensor.long(), positions.long(), layout, rows, pages.tensor, 0, ropes, repeated)


def _send(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """One copy to the device instead of many small ones."""
    sizes = [-(-array.size // _ALIGNED_INTS) * _ALIGNED_INTS for array in arrays]
    packed = np.zeros(sum(sizes), np.int32)
    starts = np.cumsum([0, *sizes]).tolist()
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.size] = array.reshape(-1)
    sent = torch.from_numpy(packed).to(device)
    return [
        sent[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
