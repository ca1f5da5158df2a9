"""The experts of one layer behind a cache on flash, in one native call, and the table of who is in memory.

Knows: slots, keys, planes, digests, file descriptors. Does not know: bundles, budgets, what to do about wrong bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels.experts import ExpertWeights
from edge_kernels.flash import CHECKED_FIRST, DIGEST_BYTES, FlashReads, Landed, landed_of

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

ExpertSlots = _native.ExpertSlots


@dataclass(frozen=True, slots=True)
class LayerOnFlash:
    """Expert e is the `stride` of the weights from byte `first_byte + e * stride` of `file` on, in planes of
    `plane_bytes` one behind the other; its key in the table is `first_key + e`.

    `digests`: of every plane of every expert, plane after plane (as in `flash.Part`).
    """

    file: int
    first_byte: int
    first_key: int
    experts: int
    plane_bytes: tuple[int, ...]
    digests: Sequence[bytes]


class LayerResult(NamedTuple):
    """`rows` [R, hidden]; None where something did not come right: `landed` says what, by key
    `expert * planes + plane`, and all experts are still pinned. Hits and misses count an expert once.
    """

    rows: F32 | None
    hits: int
    misses: int
    waited_seconds: float
    landed: tuple[Landed, ...]


class FlashLayer:
    """One thread uses it, and the table and the reads that it shares with other layers.

    `weights`: the slots as experts, all of one arena, whose memory must stay where it is.
    """

    def __init__(
        self, slots: ExpertSlots, reads: FlashReads, weights: ExpertWeights, layer: LayerOnFlash
    ) -> None:
        self._hidden = weights.hidden
        digests = np.frombuffer(b"".join(layer.digests), np.uint8).reshape(-1, DIGEST_BYTES)
        self._native = _native.FlashLayer(
            slots,
            reads.native,
            weights.buffer,
            (layer.file, layer.first_byte, layer.first_key, layer.experts),
            np.array(layer.plane_bytes, np.int64),
            digests,
            weights.format,
            weights.hidden,
            weights.intermediate,
            weights.stride_bytes,
            weights.part_offsets,
        )

    def run(
        self,
        x: F32,
        ids: I32,
        gates: F32,
        *,
        step: int,
        activation: str,
        threads: int = 1,
        owner: int = CHECKED_FIRST,
    ) -> LayerResult:
        """What `run_experts` gives for the layer's experts `ids` [R, top_k], bit for bit: those that are not in
        memory are read. At most as many uses as there are slots; nothing else may be on its way.

        `owner`, a number from 0 on: experts are used when their bytes have come, and are checked later, while another
        layer waits for flash or by `reads.check`, which gives this number back with what was wrong. Nothing that came
        of these rows may be let out before. `landed` is empty where all came.
        """
        if activation != "silu":
            raise ValueError(f"unknown activation {activation!r}: experts know silu")
        y = np.empty((len(x), self._hidden), np.float32)
        # Arrays of other types or orders are converted by the binding: what is called here is cold, layer after layer.
        hits, misses, waited_seconds, landed = self._native.run(x, ids, gates, step, y, threads, owner)
        if not landed:
            return LayerResult(y, hits, misses, waited_seconds, ())
        is_whole, found = landed_of(landed)
        return LayerResult(y if is_whole else None, hits, misses, waited_seconds, found)
