"""Attention over a paged KV cache, for ragged batches.

The pool is float32 [num_pages, layers, 2, 32, kv_heads, head_dim] (2: keys, values). Row p of a sequence lies in page
`block_tables[sequence, p // 32]` at slot p % 32. A row's result depends on its own sequence and position alone, bit for
bit: keys are reduced page by page on that absolute grid, in order.

Knows: pages, rows, heads. Does not know: who owns pages, sessions, or weights' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels import reference

PAGE_TOKENS = 32

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Where R rows of S sequences lie. `lengths` counts a sequence's rows, the new ones included."""

    positions: I32  # [R] absolute position in its sequence
    sequence: I32  # [R] index into the next two
    block_tables: I32  # [S, max_blocks] page of each 32 rows; entries past the length are not read
    lengths: I32  # [S]


prepare_qk = reference.prepare_qk
append_kv = reference.append_kv
paged_attention = reference.paged_attention
