"""How fast flash is beside a product: between its tokens, stand-ins for the experts that it has just read are read.

What was read minutes ago comes several times as fast as what was not, since the drive, or the host of a virtual
machine, keeps it. So flash is measured with the same mixture, at the same minute: every expert that the routing asks
for has a stand-in in its layer that it never asks for. They are read as often, in the same order, as long after the
last time, and as many at once: all that a token misses in a layer, then in the next. So this is the bandwidth at the
product's read size and depth, as the limit is defined with; nobody computes meanwhile.

Knows: traces, files, threads. Does not know: caches, limits.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from edge_kernels.flash import DIGEST_BYTES, FlashReads, Part

from edge_runtime.bundle.hashing import EXPERT_PIECE_BYTES
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import open_for_reading
from edge_runtime.experts.policies import POLICIES
from edge_runtime.experts.slot_table import ABSENT, SlotTable
from edge_runtime.experts.trace import RoutingTrace

SLOTS = 8  # of one place in a layer's reads: more than a huge page
STRETCH_TOKENS = 8
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


def spread(bytes_per_second: Sequence[float]) -> str:
    """Median and quartiles, in GB/s."""
    low, middle, high = statistics.quantiles(list(bytes_per_second) * 2, n=4)
    return f"{middle / 1e9:.2f} ({low / 1e9:.2f} to {high / 1e9:.2f})"


class FlashBeside:
    """`follow` after each token; `bytes_per_second`: of each stretch of tokens, 0 where nothing was missed."""

    def __init__(self, layers: Sequence[ExpertLayer], trace: RoutingTrace, slots: int, policy: str) -> None:
        self.bytes_per_second: list[float] = []
        self._layers = {layer.layer: layer for layer in layers}
        self._files = {layer.layer: open_for_reading(layer.path, direct=True) for layer in layers}
        own = tuple([access for access in trace.accesses if access.layer in self._layers])
        trace = replace(trace, accesses=own)
        self._missed = missed_experts(trace, slots, policy)
        self._stand_ins = stand_ins(trace)
        self._arena = Arena(trace.top_k * SLOTS, max(layer.stride_bytes for layer in layers))
        self._reads = FlashReads(EXPERT_PIECE_BYTES)
        self._read_layers = 0
        self._waiting: list[list[Expert]] = []  # by layer of a token

    def follow(self, token: int) -> float:
        """Seconds that it took, of which the token's product knows nothing."""
        begin = time.perf_counter()
        found = [self._stand_ins[expert] for expert in self._missed[token] if expert in self._stand_ins]
        self._waiting += [list(layer) for _, layer in groupby(found, key=lambda expert: expert[0])]
        if token == PROMPT:
            for layer in self._waiting:
                self._read(layer)
            self._waiting = []
        elif (token + 1) % STRETCH_TOKENS == 0:
            self.bytes_per_second.append(self._read_stretch())
            self._waiting = []
        return time.perf_counter() - begin

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _read_stretch(self) -> float:
        """Bytes a second."""
        read_bytes = sum(self._layers[layer].stride_bytes for own in self._waiting for layer, _ in own)
        seconds = sum(self._read(own) for own in self._waiting)
        return read_bytes / seconds if read_bytes else 0.0

    def _read(self, experts: Sequence[Expert]) -> float:
        """What a layer misses, all at once: seconds."""
        places = self._arena.slots // SLOTS
        return sum(
            self._read_together(experts[start : start + places]) for start in range(0, len(experts), places)
        )

    def _read_together(self, experts: Sequence[Expert]) -> float:
        self._read_layers += 1
        parts = [self._part(place, own) for place, own in enumerate(experts)]
        return self._reads.time_reads(self._arena.bytes, parts)

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
