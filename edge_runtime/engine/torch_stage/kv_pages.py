"""Pages of KV memory that torch can reach.

On the CPU they are a `KvCache`'s, seen as a tensor; elsewhere one allocation that is taken whole at the start, since a
GPU has no pages to commit one by one.
Knows: tensors over pages. Does not know: attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.engine.kv_cache import FLOAT_BYTES, KvCache, KvPages, KvShape
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic


class HostPages(KvCache):
    """float32, in this process's memory."""

    def __init__(self, shape: KvShape, num_pages: int) -> None:
        super().__init__(shape, num_pages)
        self.tensor = torch.from_numpy(self.pool)


class DevicePages(KvPages):
    """bf16 or float32 on any device. Pages that are not used keep what was in them."""

    def __init__(self, shape: KvShape, num_pages: int, arithmetic: Arithmetic) -> None:
        super().__init__(shape, num_pages)
        dims = (max(num_pages, 1), shape.layers, 2, PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        self.tensor = torch.empty(dims, dtype=arithmetic.dtype, device=arithmetic.device)

    @property
    def committed_bytes(self) -> int:
        return int(self.tensor.nbytes)

    def write_pages(self, pages: Sequence[int], values: NDArray[np.float32]) -> None:
        self.tensor[list(pages)] = torch.from_numpy(values).to(self.tensor)

    def close(self) -> None:
        super().close()
        self.tensor = self.tensor[:0]

    def copy_rows(self, source: int, target: int, rows: int = PAGE_TOKENS) -> None:
        self.tensor[target, :, :, :rows] = self.tensor[source, :, :, :rows]

    def _release(self, pages: Iterable[int]) -> None:
        pass  # the next session writes over them


TorchPages = HostPages | DevicePages


def make_pages(shape: KvShape, num_pages: int, arithmetic: Arithmetic) -> TorchPages:
    if arithmetic.device.type == "cpu" and arithmetic.dtype == torch.float32:
        return HostPages(shape, num_pages)
    return DevicePages(shape, num_pages, arithmetic)


def page_bytes(shape: KvShape, arithmetic: Arithmetic) -> int:
    return shape.page_bytes // FLOAT_BYTES * arithmetic.dtype.itemsize
