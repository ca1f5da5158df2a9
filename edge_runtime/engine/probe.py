"""What a stage can do on this machine, measured: are its rows invariant, and how long do they take.

The probe runs one loaded layer (and the head, where the stage has it) on random rows, beside the stage's own
sessions and memory. It never takes much longer than its budget.
Knows: rows, bits, seconds. Does not know: links, plans, or what the numbers are used for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Span
from edge_runtime.engine.blocks import run_context
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.kv_cache import KvCache, KvPages, KvShape
from edge_runtime.engine.page_table import PAGE_TOKENS, pages_for
from edge_runtime.engine.sampler import Sampler

Rows = NDArray[np.float32]
Clock = Callable[[], float]

BATCH_SIZES = (
    2,
    64,
    4,
    16,
    8,
    32,
    3,
    5,
    7,
    33,
)  # the likeliest to differ first: the budget may end before the list
PROBE_ROWS = 66
CHUNK_ROWS = 128
BURSTS = 5  # of each timing
MAX_CONTEXT_ROWS = 1024  # of KV that the probe commits
_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    numeric_class: str
    row_invariant: bool
    why_not: str  # "" where rows are invariant
    checked_rows: int  # the largest batch compared
    layer_decode_seconds: float  # one row through one layer, mid context
    layer_prefill_row_seconds: float  # per row of a full chunk through one layer
    head_seconds: float  # one row through final norm, head and sampler; 0 where the stage has no head


class ProbedBlock(Protocol):
    is_causal: bool
    attention_count: int


@runtime_checkable
class ProbedStage(Protocol):
    """A stage of another executor than the CPU's: it makes pages for the probe and runs a block over them."""

    layers: LayerRange
    numeric_class: str

    @property
    def model(self) -> ModelInfo: ...

    @property
    def kv_shape(self) -> KvShape: ...

    @property
    def kv_capacity_tokens(self) -> int: ...

    @property
    def blocks(self) -> Mapping[str, ProbedBlock]: ...

    def scratch_pages(self, shape: KvShape, num_pages: int) -> Any: ...

    def run_block(self, name: str, hidden: Rows, spans: Sequence[Span], pages: Any) -> Rows: ...


def probe(
    stage: CpuStage | ProbedStage,
    *,
    budget_seconds: float = 2.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> ProbeResult:
    """Half the budget goes to invariance, half to timings. The stage's sessions are not touched."""
    start = clock()
    layer = _LayerProbe(stage, np.random.default_rng(seed))
    why_not, checked = _invariance(layer, clock, start + 0.5 * budget_seconds)
    has_head = "head" in stage.blocks and stage.model.kind == "generator"
    if has_head and not why_not:
        why_not = _head_invariance(layer)
    decode, prefill, head = _timings(layer, clock, budget_seconds, has_head=has_head)
    return ProbeResult(stage.numeric_class, not why_not, why_not, checked, decode, prefill, head)


def _timings(
    layer: _LayerProbe, clock: Clock, budget_seconds: float, *, has_head: bool
) -> tuple[float, float, float]:
    """(decode, prefill row, head) seconds, medians of bursts in turns: what makes the machine slow for a part of a
    second, or fast, says little of any of them."""
    share = budget_seconds / BURSTS
    end = clock() + 0.5 * budget_seconds
    decode, prefill, head = list[float](), list[float](), list[float]()
    while not decode or (len(decode) < BURSTS and clock() < end):
        decode.append(layer.time_decode(clock, 0.15 * share))
        prefill.append(layer.time_prefill(clock, 0.2 * share, 0.2 * budget_seconds, decode[0]))
        if has_head:
            head.append(_time_head(layer, clock, 0.1 * share))
    return median(decode), median(prefill), median(head) if head else 0.0


class _LayerProbe:
    """One layer of a stage with KV memory of its own."""

    def __init__(self, stage: CpuStage | ProbedStage, rng: np.random.Generator) -> None:
        self._stage = stage
        self._name = f"layers.{stage.layers.first}"
        self.block: ProbedBlock = stage.blocks[self._name]
        self.vocab_size = stage.model.vocab_size
        positions = min(MAX_CONTEXT_ROWS, stage.model.max_context_tokens, stage.kv_capacity_tokens)
        self.max_rows = positions
        self.rows = rng.standard_normal((max(PROBE_ROWS, CHUNK_ROWS), stage.model.hidden_size), np.float32)
        shape = replace(stage.kv_shape, layers=self.block.attention_count)
        num_pages = 2 * pages_for(positions) + 8 * pages_for(PROBE_ROWS)
        self.cache: KvPages
        if isinstance(stage, CpuStage):
            self.cache = KvCache(shape, num_pages)
        else:
            self.cache = stage.scratch_pages(shape, num_pages)
        self._rng = rng

    def run(self, *parts: tuple[int, int, Rows]) -> Rows:
        """Parts are (session, base row, rows); a session opens with its row 0."""
        spans = []
        for session, base, rows in parts:
            if base == 0:
                self.cache.drop(SessionId(session))
                self.cache.open(SessionId(session), max(len(rows), min(PROBE_ROWS, self.max_rows)))
            self.cache.append(SessionId(session), base, len(rows))
            spans.append(Span(SessionId(session), base, (0,) * len(rows)))
        hidden = np.concatenate([rows for _, _, rows in parts])
        return self._run(self._name, hidden, spans)

    def run_head(self, rows: Rows) -> Rows:
        return self._run("head", rows, ())

    def _run(self, name: str, rows: Rows, spans: Sequence[Span]) -> Rows:
        if not isinstance(self._stage, CpuStage):
            return self._stage.run_block(name, rows, spans, self.cache)
        assert isinstance(self.cache, KvCache)
        return self._stage.blocks[name].run(rows, run_context(spans, self.cache, self._stage.ropes), 0)

    def fill(self, session: int, rows: int) -> None:
        """Make `session` hold `rows` rows of random keys and values, without computing them."""
        self.cache.drop(SessionId(session))
        self.cache.open(SessionId(session), self.max_rows)
        if rows:
            self.cache.append(SessionId(session), 0, rows)
            pages = self.cache.table.get(SessionId(session)).pages
            kv = self.cache.shape
            dims = (len(pages), kv.layers, 2, PAGE_TOKENS, kv.kv_heads, kv.head_dim)
            self.cache.write_pages(pages, self._rng.standard_normal(dims, np.float32))

    def time_decode(self, clock: Clock, budget_seconds: float) -> float:
        base = self.max_rows // 2 if self.block.is_causal else 0
        self.fill(1, base)
        return _quick_quartile(lambda: self._again(base, 1), clock, budget_seconds)

    def time_prefill(
        self, clock: Clock, budget_seconds: float, chunk_seconds: float, decode_seconds: float
    ) -> float:
        """Seconds per row of a chunk; a slow device gets a shorter chunk than a full one."""
        affordable = int(chunk_seconds / max(decode_seconds, 1e-9))
        count = max(1, min(CHUNK_ROWS, self.max_rows, max(8, affordable)))
        base = min(self.max_rows // 2, self.max_rows - count) if self.block.is_causal else 0
        self.fill(1, base)
        return _quick_quartile(lambda: self._again(base, count), clock, budget_seconds) / count

    def _again(self, base: int, count: int) -> None:
        session = SessionId(1)
        self.cache.append(session, base, count)  # a new parent: the rows of the last time go
        self._run(self._name, self.rows[:count], [Span(session, base, (0,) * count)])


def _invariance(layer: _LayerProbe, clock: Clock, deadline: float) -> tuple[str, int]:
    """(what differed or "", the largest batch compared)."""
    count = min(PROBE_ROWS, layer.max_rows)
    if not layer.block.is_causal:
        return _encoder_invariance(layer, count)
    alone = []
    for row in range(count):
        alone.append(layer.run((1, row, layer.rows[row : row + 1])))
        if clock() > deadline and row > 2:
            break
    expected = np.concatenate(alone)
    checked = 1
    for size in (size for size in BATCH_SIZES if size <= len(expected)):
        if checked > 1 and clock() > deadline:
            break
        if not np.array_equal(layer.run((2, 0, layer.rows[:size])), expected[:size]):
            return f"a prefill of {size} rows differs from {size} rows one by one", size
        if why_not := _mates_differ(layer, expected, size):
            return why_not, size
        checked = max(checked, size)
    return "", checked


def _mates_differ(layer: _LayerProbe, expected: Rows, size: int) -> str:
    """Sessions at different rows decode together, one of them with a chunk."""
    bases = [base for base in (1, size // 2, size - 1) if 0 < base < len(expected)]
    parts: list[tuple[int, int, Rows]] = []
    wanted = []
    for session, base in enumerate(bases, start=3):
        layer.run((session, 0, layer.rows[:base]))
        end = base + 1 if session > 3 else min(len(expected), base + 3)
        parts.append((session, base, layer.rows[base:end]))
        wanted.append(expected[base:end])
    if not np.array_equal(layer.run(*parts), np.concatenate(wanted)):
        return f"rows at {', '.join(map(str, bases))} of different sessions change when they run together"
    return ""


def _encoder_invariance(layer: _LayerProbe, count: int) -> tuple[str, int]:
    lengths = [length for length in (1, 7, count // 2) if length > 0]
    parts = [(session, 0, layer.rows[:length]) for session, length in enumerate(lengths, start=2)]
    expected = np.concatenate([layer.run(part) for part in parts])
    same = np.array_equal(layer.run(*parts), expected)
    return ("" if same else "sequences change when they run together"), sum(lengths)


def _head_invariance(layer: _LayerProbe) -> str:
    sizes = (2, 4, 16)
    alone = np.concatenate([layer.run_head(layer.rows[r : r + 1]) for r in range(max(sizes))])
    for size in sizes:
        if not np.array_equal(layer.run_head(layer.rows[:size]), alone[:size]):
            return f"the head's logits of {size} rows differ from {size} rows one by one"
    return ""


def _time_head(layer: _LayerProbe, clock: Clock, budget_seconds: float) -> float:
    sampler = Sampler(_SAMPLING, layer.vocab_size)
    positions = iter(range(1 << 30))

    def once() -> None:
        sampler.sample(layer.run_head(layer.rows[:1])[0], next(positions))

    return _quick_quartile(once, clock, budget_seconds)


def _quick_quartile(work: Callable[[], None], clock: Clock, budget_seconds: float) -> float:
    """A quarter of the runs took no longer: what else a starting machine does only makes them slower.

    Of at least one run after a warm-up, and as many as the budget holds, up to 50.
    """
    work()
    seconds: list[float] = []
    deadline = clock() + budget_seconds
    while len(seconds) < 50 and (not seconds or clock() < deadline):
        before = clock()
        work()
        seconds.append(clock() - before)
    return sorted(seconds)[len(seconds) // 4]
