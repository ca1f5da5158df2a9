"""How fast flash is beside a product: between its tokens, stand-ins for the experts that it has just read are read.

What was read minutes ago comes several times as fast as what was not, since the drive, or the host of a virtual
machine, keeps it. So flash is measured with the same mixture, at the same minute: every expert that the routing asks
for has a stand-in in its layer that it never asks for. They are read as often, in the same order, as long after the
last time, and as many at once: a token in memory beside the product's reads in each layer what the product's last
token missed there, while all threads compute as many experts as that layer had in memory, as any schedule must: where
a machine's host reads on its guest's own processors, flash is slower then. In every fourth token nobody computes
meanwhile. Nothing is hashed. So this is the bandwidth at the product's read size, depth, spacing and concurrent
compute.

Knows: traces, files. Does not know: limits.
"""

from __future__ import annotations

import os
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from edge_kernels.flash import DIGEST_BYTES, FlashReads, Part
from numpy.typing import NDArray

from benchmarks.memory_beside import MemoryBeside
from edge_runtime.bundle.hashing import EXPERT_PIECE_BYTES
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import open_for_reading
from edge_runtime.experts.policies import POLICIES
from edge_runtime.experts.slot_table import ABSENT, SlotTable
from edge_runtime.experts.trace import RoutingTrace

Float32 = NDArray[np.float32]

SLOTS = 24  # of one place in a layer's reads: together more than caches hold, as the product's targets are
STRETCH_TOKENS = 8
ALONE_EVERY_TOKENS = 4
PROMPT = -1

Expert = tuple[int, int]  # layer, number


def missed_experts(trace: RoutingTrace, slots: int, policy: str) -> dict[int, list[Expert]]:
    """By token, `PROMPT` first: what a cache of so many slots reads, in order."""
    table = SlotTable(slots, trace.keys, POLICIES[policy](slots, trace.keys))
    found: dict[int, list[Expert]] = defaultdict(list)
    steps: dict[int, int] = {}
    for access in trace.accesses:
        token = steps.setdefault(access.step, len(steps)) if access.decode else PROMPT
        uses = [
            (trace.key(access.layer, expert), expert, rows)
            for expert, rows in zip(access.experts, access.rows, strict=True)
        ]
        absent = [use for use in uses if table.use(use[0], access.step, use[2]) == ABSENT]
        for key, expert, rows in absent:
            table.admit(key, access.step, rows)
            found[token].append((access.layer, expert))
        for key, _, _ in uses:
            table.unpin(key)
    return found


def stand_ins(trace: RoutingTrace) -> dict[Expert, Expert]:
    """As many as there are experts that are never asked for: of a layer with fewer, some have none."""
    asked: dict[int, dict[int, None]] = defaultdict(dict)
    for access in trace.accesses:
        asked[access.layer].update(dict.fromkeys(access.experts))
    found: dict[Expert, Expert] = {}
    for layer, experts in asked.items():
        never = [expert for expert in range(trace.experts) if expert not in experts]
        order, count = list(experts), min(len(experts), len(never))
        chosen = [order[place * len(order) // count] for place in range(count)]  # asked for early and late
        found |= {(layer, expert): (layer, other) for expert, other in zip(chosen, never, strict=False)}
    return found


def exchanged(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """About half of the experts that have stand-ins are asked for under their stand-in's number, and stand in for it.

    Which is which is drawn for every run, so that whatever the drive or a host still has of earlier runs favours
    neither side. Hits and misses are those of `trace`. Seed 0: `trace`.
    """
    if not seed:
        return trace
    draw = random.Random(seed)
    number = {own: other[1] for own, other in stand_ins(trace).items() if draw.random() < 0.5}
    accesses = tuple(
        replace(
            access,
            experts=tuple(number.get((access.layer, expert), expert) for expert in access.experts),
        )
        for access in trace.accesses
    )
    return replace(trace, accesses=accesses)


def spread(bytes_per_second: Sequence[float]) -> str:
    """Median and quartiles, in GB/s."""
    low, middle, high = statistics.quantiles(list(bytes_per_second) * 2, n=4)
    return f"{middle / 1e9:.2f} ({low / 1e9:.2f} to {high / 1e9:.2f})"


@dataclass
class Reading:
    """Of some tokens."""

    read_bytes: int = 0
    seconds: float = 0.0

    def add(self, parts: Sequence[Part], seconds: float) -> None:
        self.read_bytes += sum(part.size_bytes for part in parts)
        self.seconds += seconds

    @property
    def bytes_per_second(self) -> float:
        """0 where nothing was read."""
        return self.read_bytes / self.seconds if self.read_bytes else 0.0


class FlashBeside:
    """`prompt` first; then for each token `begin`, and `run` for its layers. `busy`, `alone`: since `end_stretch`."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        trace: RoutingTrace,
        slots: int,
        policy: str,
        memory: MemoryBeside,
    ) -> None:
        self.busy, self.alone = Reading(), Reading()
        self._memory, self._top_k = memory, trace.top_k
        self._layers = {layer.layer: layer for layer in layers}
        self._files = {layer.layer: open_for_reading(layer.path, direct=True) for layer in layers}
        own = tuple([access for access in trace.accesses if access.layer in self._layers])
        trace = replace(trace, accesses=own)
        self._missed = missed_experts(trace, slots, policy)
        self._stand_ins = stand_ins(trace)
        self._arena = Arena(trace.top_k * SLOTS, max(layer.stride_bytes for layer in layers))
        self._reads = FlashReads(EXPERT_PIECE_BYTES)
        self._read_layers = 0
        self._token: dict[int, list[Expert]] = {}  # by layer: what is to be read
        self._is_alone = False

    def prompt(self) -> None:
        for experts in self._of(PROMPT).values():
            for start in range(0, len(experts), self._top_k):
                self._reads.time_reads(self._arena.bytes, self._parts(experts[start : start + self._top_k]))

    def begin(self, token: int) -> None:
        """The product's last: its misses have stand-ins in the layers that come."""
        self._token = self._of(token)
        self._is_alone = (token + 1) % ALONE_EVERY_TOKENS == 0

    def end_stretch(self) -> tuple[float, float]:
        """Bytes a second: busy, alone."""
        found = self.busy.bytes_per_second, self.alone.bytes_per_second
        self.busy, self.alone = Reading(), Reading()
        return found

    def run(self, layer: int, x: Float32, gates: Float32) -> Float32:
        """x [1, hidden], gates [1, top_k] -> [1, hidden]: a row of the right shape, after all of a layer's reads and
        products."""
        experts, memory = self._token.get(layer, []), self._memory
        misses = len(experts)
        if not misses:
            return memory.run(layer, x, gates)
        parts = self._parts(experts)
        hits, weights = memory.some(layer, self._top_k - misses)
        if self._is_alone or misses == self._top_k:
            self.alone.add(parts, self._reads.time_reads(self._arena.bytes, parts))
            return memory.run(layer, x, gates)
        seconds = self._reads.time_reads_beside(self._arena.bytes, parts, x, hits, weights, memory.threads)
        self.busy.add(parts, seconds)
        return memory.run(layer, x, gates[:, :misses], misses)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _of(self, token: int) -> dict[int, list[Expert]]:
        found = [self._stand_ins[expert] for expert in self._missed[token] if expert in self._stand_ins]
        return {layer: list(own) for layer, own in groupby(found, key=lambda expert: expert[0])}

    def _parts(self, experts: Sequence[Expert]) -> list[Part]:
        self._read_layers += 1
        return [self._part(place, own) for place, own in enumerate(experts)]

    def _part(self, place: int, expert: Expert) -> Part:
        layer = self._layers[expert[0]]
        slot = place * SLOTS + self._read_layers % SLOTS
        return Part(
            place,
            self._files[layer.layer],
            layer.offset(expert[1]),
            layer.stride_bytes,
            slot * self._arena.slot_bytes,
            bytes(DIGEST_BYTES),
        )
