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


def torch_context(spans: Sequence[Span], pages: TorchPages, ropes: Ropes) -> TorchContext:
    """For spans whose rows `pages` holds already."""
    layout = lay_out(spans)
    tables = pages.block_tables([span.session for span in spans])
    ids = np.array([token for span in spans for token in span.ids], np.int32)
    sent = _send((layout.positions, layout.sequence, tables, layout.lengths, ids), pages.tensor.device)
    positions, sequence, block_tables, lengths, id_tensor = sent
    rows = PagedRows(
        positions, sequence, block_tables, lengths, layout.starts, int(layout.lengths.max(initial=0))
    )
    return TorchContext(id_tensor.long(), positions.long(), layout, rows, pages.tensor, 0, ropes)


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
