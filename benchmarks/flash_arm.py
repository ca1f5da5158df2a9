"""One arm of the flash benchmark, in a process of its own: `python -m benchmarks.flash_arm '{"bundle": …}'`.

The same stage, kernels and bytes in every arm; only where experts come from differs. Prints one JSON object.
Knows: the arms and what they note. Does not know: which arms there are to compare, or what is made of them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from edge_kernels.experts import ExpertWeights, combine, run_each
from numpy.typing import NDArray

from benchmarks.flash_beside import FlashBeside, exchanged
from benchmarks.flash_limit import Stretch
from benchmarks.memory_beside import MemoryBeside
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.product_beside import Beside, ProductBeside
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers, token_cycle_bytes
from edge_runtime.experts.lanes import open_for_reading, read_fully
from edge_runtime.experts.runner import ExpertRunner
from edge_runtime.experts.trace import RoutingTrace, read_trace

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MEMORY, MAPPED, NAIVE, PRODUCT = "memory", "mapped", "naive", "product"
SESSION = SessionId(1)
KV_BYTES = 128 << 20


@dataclass(frozen=True)
class Order:
    """What a process is told. `trace`: follow this routing; "": the model's own."""

    arm: str
    bundle: str
    trace: str = ""
    prompt_tokens: int = 28
    decode_tokens: int = 128
    cache_bytes: int = 0
    policy: str = "lfru"
    lanes: int = 2
    threads: int = 2
    passes: int = 1  # only the last is timed
    ring: bool = True  # the kernel reads on its own; False: lanes do
    one_call: bool = True
    exchange_seed: int = 0  # of experts and stand-ins (flash_beside.exchanged)
    beside: bool = False  # flash and memory are measured between tokens (flash_beside, memory_beside)
    start_bits: int = 0  # of bit-nested experts; 0: all before they are used
    cgroup: str = ""
    cgroup_version: int = 0


@dataclass
class Notes:
    """What a process found. Times are of decoding, all tokens together."""

    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    experts_seconds: float = 0.0
    processor_seconds: float = 0.0  # of all threads
    waited_seconds: float = 0.0  # for flash
    hits: int = 0
    misses: int = 0
    fewer_bits: int = 0  # of these, computed before all planes were there
    missed: list[list[int]] = field(default_factory=list)  # by token: experts read, by layer
    major_faults: int = 0
    peak_resident_bytes: int = 0
    arena_bytes: int = 0
    direct: bool = True
    stretches: list[Stretch] = field(default_factory=list)  # with what was measured beside them
    digest: str = ""  # of all ids and logits


class Routed:
    """Experts as the trace wants them, timed. Gates stay the model's own."""

    def __init__(self, inner: ExpertRunner, replay: Replay | None, layer: int, notes: Notes) -> None:
        self._inner, self._replay, self._layer, self._notes = inner, replay, layer, notes
        self.in_memory: Beside | None = None  # who computes instead, for now
        self.beside_seconds = 0.0

    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        if self._replay is not None:
            ids = self._replay.ids(self._layer, len(x))
        begin = time.perf_counter()
        if self.in_memory is not None:
            result = self.in_memory.run(self._layer, x, gates)
            self.beside_seconds += time.perf_counter() - begin
            return result
        result = self._inner.run(x, ids, gates)
        self._notes.experts_seconds += time.perf_counter() - begin
        return result


class Replay:
    """The recorded choices, row after row. A prompt's rows share what its batch chose, as recorded."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._top_k = trace.top_k
        self.prompt: dict[int, list[int]] = {}
        self.tokens: list[dict[int, tuple[int, ...]]] = []
        steps: dict[int, dict[int, tuple[int, ...]]] = {}
        for access in trace.accesses:
            if access.decode:
                steps.setdefault(access.step, {})[access.layer] = access.experts
            else:
                uses = zip(access.experts, access.rows, strict=True)
                self.prompt[access.layer] = [expert for expert, rows in uses for _ in range(rows)]
        self.tokens = list(steps.values())
        self.token = -1  # the prompt

    def ids(self, layer: int, rows: int) -> Int32:
        if self.token >= 0:
            return np.array([self.tokens[self.token][layer]] * rows, np.int32)
        chosen = self.prompt[layer]
        # Dealt out in turn, so that the copies of one expert go to different rows.
        count = -(-len(chosen) // self._top_k)
        table = [
            [chosen[(rank * count + row) % len(chosen)] for rank in range(self._top_k)]
            for row in range(count)
        ]
        return np.array([table[row % count] for row in range(rows)], np.int32)


class NaiveExperts:
    """On demand: every expert is read when it is needed, one after the other, past the page cache; none is kept."""

    def __init__(self, layer: ExpertLayer, threads: int) -> None:
        self._layer, self._threads = layer, threads
        self._file = open_for_reading(layer.path, direct=True)
        self._map = mmap.mmap(-1, layer.stride_bytes)
        self._weights = ExpertWeights(
            np.frombuffer(self._map, np.uint8),
            layer.format,
            1,
            layer.hidden,
            layer.intermediate,
            layer.stride_bytes,
            layer.offsets,
        )

    def run(self, x: Float32, ids: Int32, gates: Float32) -> Float32:
        flat = ids.reshape(-1)
        outputs = np.empty((flat.size, self._layer.hidden), np.float32)
        for expert in dict.fromkeys(flat.tolist()):
            read_fully(self._file, memoryview(self._map), self._layer.offset(expert))
            places = np.flatnonzero(flat == expert)
            outputs[places] = run_each(
                x[places // ids.shape[1]],
                np.zeros(len(places), np.int32),
                self._weights,
                activation="silu",
                threads=self._threads,
            )
        return combine(outputs, gates)


def run(order: Order) -> Notes:
    if order.cgroup:
        MemoryCgroup(Path(order.cgroup), order.cgroup_version).enter()
    notes = Notes()
    bundle = Bundle.open(order.bundle)
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    begin = time.perf_counter()
    stage = CpuStage.load(
        bundle, layers, threads=order.threads, kv_budget_bytes=KV_BYTES, experts=_options(order, bundle)
    )
    notes.load_seconds = time.perf_counter() - begin
    replay = Replay(_trace(order)) if order.trace else None
    _route(order, bundle, stage, replay, notes)
    if order.arm == MEMORY and stage.experts is None:
        _touch(bundle)
    beside = _beside(order, bundle, stage, notes)
    try:
        for _ in range(order.passes):
            _generate(order, stage, replay, notes, beside)
        if beside is not None:
            notes.stretches = beside.stretches
            beside.close()
        if stage.experts is not None:
            notes.arena_bytes, notes.direct = stage.experts.arena_bytes, stage.experts.reader.direct
    finally:
        stage.close()
    notes.peak_resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return notes


def _trace(order: Order) -> RoutingTrace:
    return exchanged(read_trace(order.trace), order.exchange_seed)


def _beside(order: Order, bundle: Bundle, stage: CpuStage, notes: Notes) -> ProductBeside | None:
    """None also where the kernel does not read on its own: there is no limit then."""
    if not order.beside or stage.experts is None or not stage.experts.kernel_reads:
        return None
    layers = expert_layers(bundle, bundle.manifest.layers)
    slots = order.cache_bytes // layers[0].stride_bytes
    trace = _trace(order)
    steps = [stage.blocks[f"layers.{layer.layer}"].experts_steps[0] for layer in layers]
    memory = MemoryBeside(stage.experts, trace.top_k, order.threads)
    return ProductBeside(
        stage.experts,
        [cast(Routed, step.runner) for step in steps],
        memory,
        FlashBeside(layers, trace, slots, order.policy, memory),
        lambda: notes.experts_seconds,
    )


def _options(order: Order, bundle: Bundle) -> CacheOptions | None:
    if order.arm in (MEMORY, MAPPED) and not order.cache_bytes:
        return None
    last = bundle.manifest.num_layers - 1
    least = token_cycle_bytes(bundle.manifest, 0, last)
    return CacheOptions(
        order.cache_bytes or least,
        policy=order.policy,
        lanes=order.lanes,
        ring=order.ring,
        one_call=order.one_call,
        start_bits=order.start_bits,
    )


def _route(order: Order, bundle: Bundle, stage: CpuStage, replay: Replay | None, notes: Notes) -> None:
    layers = {layer.layer: layer for layer in expert_layers(bundle, bundle.manifest.layers)}
    for number, layer in layers.items():
        (step,) = stage.blocks[f"layers.{number}"].experts_steps
        inner = NaiveExperts(layer, order.threads) if order.arm == NAIVE else step.runner
        step.runner = Routed(inner, replay, number, notes)


def _touch(bundle: Bundle) -> None:
    """Every page of every expert, so that memory is really where they are."""
    for block in bundle.manifest.layers:
        for key in bundle.manifest.expert_slices(block):
            np.frombuffer(bundle.slice_bytes(key), np.uint8)[::4096].sum()


def _generate(
    order: Order, stage: CpuStage, replay: Replay | None, notes: Notes, beside: ProductBeside | None = None
) -> None:
    """A prompt and greedy tokens after it, noted from scratch."""
    notes.missed.clear()
    rng = np.random.default_rng(1)
    vocab = stage.model.vocab_size
    ids = [int(token) for token in rng.integers(1, vocab, order.prompt_tokens)]
    found = hashlib.sha256()
    stage.open(SESSION, order.prompt_tokens + order.decode_tokens)

    def step(base: int, rows: list[int], found: hashlib._Hash = found) -> int:
        logits = stage.run(Batch((Span(SESSION, base, tuple(rows), 1),), None))
        found.update(logits.tobytes())
        return int(logits[-1].argmax())

    if replay is not None:
        replay.token = -1
    begin = time.perf_counter()
    token = step(0, ids)
    notes.prefill_seconds = time.perf_counter() - begin
    if beside is not None:
        beside.prompt()
    notes.experts_seconds = 0.0
    misses = _misses(stage)
    total = stage.experts.statistics.total if stage.experts is not None else None
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    processor = time.process_time()
    begin = time.perf_counter()
    for index in range(order.decode_tokens):
        if replay is not None:
            replay.token = index
        base, row = order.prompt_tokens + index, [token]
        if beside is not None:
            beside.before(index, partial(step, base, row, hashlib.sha256()))
        token = step(base, row)
        now = _misses(stage)
        notes.missed.append([new - old for new, old in zip(now, misses, strict=True)])
        misses = now
        if beside is not None:
            beside.after(index, notes.missed[-1])
    aside_seconds = beside.aside_seconds if beside is not None else 0.0
    notes.decode_seconds = time.perf_counter() - begin - aside_seconds
    notes.processor_seconds = time.process_time() - processor
    notes.major_faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    if stage.experts is not None and total is not None:
        after = stage.experts.statistics.total
        notes.hits, notes.misses = after.hits - total.hits, after.misses - total.misses
        notes.waited_seconds = after.waited_seconds - total.waited_seconds
        notes.fewer_bits = after.fewer_bits - total.fewer_bits
    notes.digest = found.hexdigest()
    stage.drop(SESSION)


def _misses(stage: CpuStage) -> list[int]:
    if stage.experts is None:
        return []
    return [own.misses for own in stage.experts.statistics.layers.values()]


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(asdict(run(Order(**order)))))
    sys.stdout.flush()
    os._exit(0)  # nothing to tidy up that would be worth waiting for


Runner = Callable[[Order], Notes]

if __name__ == "__main__":
    main()
