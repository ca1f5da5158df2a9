"""Consecutive layers in one native call, for batches of few rows: what lies between two calls is then as long as they.

`LayerChain` runs as the blocks it is made of do, and gives the same bits.
Knows: which blocks and batches can be run so. Does not know: sessions, or what a chain does inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from edge_kernels.chain import Chain, Part, compile_chain
from numpy.typing import NDArray

from edge_runtime.engine.blocks import LoadedBlock
from edge_runtime.engine.cut_operations import AttentionStep, RopeTables, RunContext
from edge_runtime.engine.executors import NATIVE

Float32 = NDArray[np.float32]

MOST_ROWS = 32  # a session that goes is noticed between two calls


class Runner(Protocol):
    """A block, or several as one."""

    name: str
    attention_count: int

    def run(self, hidden: Float32, context: RunContext, kv_layer: int) -> Float32: ...


class LayerChain:
    """`name` is that of its last block."""

    def __init__(self, blocks: Sequence[LoadedBlock], parts: Sequence[Part], hidden_size: int) -> None:
        self.name = blocks[-1].name
        self.attention_count = sum(block.attention_count for block in blocks)
        self._threads = blocks[0].threads
        self._chain: Chain = compile_chain(parts, "hidden", hidden_size)

    def run(self, hidden: Float32, context: RunContext, kv_layer: int) -> Float32:
        """`kv_layer` is that of the parts: a chain belongs to one stage."""
        return self._chain.run(hidden, context.pool, context.rows, threads=self._threads)


def can_chain(context: RunContext) -> bool:
    """Side rows keep their keys and values elsewhere, and many rows gain nothing."""
    return context.written is None and len(context.ids) <= MOST_ROWS


def chained(
    blocks: Mapping[str, LoadedBlock], executor: str, ropes: RopeTables, hidden_size: int
) -> list[Runner]:
    """The blocks in order, neighbours that need nothing but our own kernels as one."""
    if executor != NATIVE:
        return list(blocks.values())
    runners: list[Runner] = []
    waiting: list[LoadedBlock] = []
    parts: list[Part] = []
    kv_layer = 0
    for block in blocks.values():
        found = _parts(block, kv_layer, ropes)
        kv_layer += block.attention_count
        if found:
            waiting.append(block)
            parts += found
            continue
        if waiting:
            runners.append(LayerChain(waiting, parts, hidden_size))
        runners.append(block)
        waiting, parts = [], []
    if waiting:
        runners.append(LayerChain(waiting, parts, hidden_size))
    return runners


def _parts(block: LoadedBlock, kv_layer: int, ropes: RopeTables) -> list[Part]:
    """Of a layer; none where something else takes part, and of the embedding and the head."""
    from edge_runtime.engine.native import NativeSegment

    if not block.attention_count:
        return []
    parts: list[Part] = []
    for step in block.steps:
        if isinstance(step, NativeSegment):
            parts.append(step.part())
        elif isinstance(step, AttentionStep):
            parts.append(step.part(kv_layer, ropes))
        else:
            return []
    return parts
