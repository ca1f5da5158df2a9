"""Bit-nested experts: how much sooner the first token comes if 2 bits are enough to begin with, and what that costs.

`python -m benchmarks.flash_nested [--json] [--small]`; part of `flash`, too. Arms in turns, each in a fresh process
with nothing of its experts in the page cache, under the same memory limit, with the same planes, kernels and routing.
Before each, all experts are read once past the page cache: a virtual machine's flash has caches beneath it that can't
be emptied (0.4 GB/s where nothing was read for long, 4 the second time), so both arms find them full:

- 4 bits: an expert is used when both of its planes are here
- 2 bits: when the first is here; the second is read while nobody waits for a read (`--expert-start-bits 2`)

and all experts in memory, to see that 4 bits are the same bits. The perplexity is the demo model's, on text it was not
trained on, token after token from an empty cache; a random model's would mean nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import CACHE
from benchmarks.flash import DEMO_CHECKPOINT, OVERHEAD_BYTES, QWEN, Arm, Figures, Result, run_arm
from benchmarks.flash_arm import MEMORY, PRODUCT, Order
from benchmarks.random_moe import LARGE, TINY, random_moe
from benchmarks.report import Report, arguments, say
from benchmarks.speculative_coupling import held_out_windows
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_probe import measure_flash
from edge_runtime.experts.flash_store import expert_bytes, expert_layers
from edge_runtime.experts.lanes import direct_works, open_for_reading, read_fully

CACHE_SHARE = 25  # per cent of the experts
DECODE_TOKENS = 32
PAIRS = 6  # even: each arm comes first as often
WINDOWS = 6  # of held-out text
START_BITS = 2
PIECE_BYTES = 4 << 20
MEMORY_NAME, WHOLE_NAME, EARLY_NAME = "memory", "4 bits", "2 bits"
_SESSION = SessionId(1)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 7 MB: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    rounds = given.rounds or (1 if given.small else PAIRS)
    report = Report("bit-nested experts", only_json=given.json, threads=given.threads, rounds=rounds)
    report.end(nested(report, given.threads, rounds, small=given.small))


def nested(report: Report, threads: int, rounds: int, *, small: bool) -> Figures:
    """`nested_ttft_ratio` is None where no memory limit can be set; `nested_identical`: 4 bits gave memory's bits."""
    figures: Figures = {"nested_ttft_ratio": None}
    quality = _perplexities(report, 1 if small else WINDOWS, threads)
    bundle = Bundle.open(random_moe(replace(TINY if small else LARGE, weights="nested4")))
    results, pairs = _rounds(_arms(bundle, threads), bundle, rounds, report)
    whole, early = results.get(WHOLE_NAME), results.get(EARLY_NAME)
    figures["nested_identical"] = (
        len(
            {
                digest
                for name in (MEMORY_NAME, WHOLE_NAME)
                if name in results
                for digest in results[name].digests
            }
        )
        == 1
    )
    if whole is not None and early is not None and pairs:
        ratios = sorted(later / first for first, later in pairs)
        first, later = whole.notes.prefill_seconds, early.notes.prefill_seconds
        figures["nested_ttft_ratio"] = statistics.median(ratios)
        figures["nested_ttft_4_bits_seconds"], figures["nested_ttft_2_bits_seconds"] = first, later
        report.line(
            f"first token after a cold start, cache of {CACHE_SHARE} %: {later:.2f} s from 2 bits on, "
            f"{first:.2f} s at 4 (fastest); median of {len(ratios)} pairs one after the other "
            f"{statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"(with loading {_with_loading(early):.2f} s and {_with_loading(whole):.2f} s); then "
            f"{early.tokens_per_second:.1f} and {whole.tokens_per_second:.1f} tokens/s, "
            f"{_fewer(early):.0%} of uses at 2 bits; {quality}"
        )
    return figures


def _arms(bundle: Bundle, threads: int) -> list[Arm]:
    layers = expert_layers(bundle, bundle.manifest.layers)
    total = sum(layer.total_bytes for layer in layers)
    lanes = measure_flash(layers, budget_seconds=1.0).lanes
    cache = total * CACHE_SHARE // 100
    limit = cache + bundle.manifest.weight_bytes - total + OVERHEAD_BYTES
    base = Order(
        MEMORY, str(bundle.path), trace=str(QWEN), threads=threads, lanes=lanes, decode_tokens=DECODE_TOKENS
    )
    product = replace(base, arm=PRODUCT, cache_bytes=cache)
    return [
        Arm(MEMORY_NAME, base),
        Arm(WHOLE_NAME, product, limit),
        Arm(EARLY_NAME, replace(product, start_bits=START_BITS), limit),
    ]


def _rounds(
    arms: list[Arm], bundle: Bundle, rounds: int, report: Report
) -> tuple[dict[str, Result], list[tuple[float, float]]]:
    """In turns, forth and back; of each arm the round with the soonest first token. All in memory only once.

    Also the seconds to the first token of each round, at 4 bits and from 2 bits on: what flash gives changes within
    minutes, so only what ran one after the other is compared.
    """
    best: dict[str, Result] = {}
    pairs: list[tuple[float, float]] = []
    in_memory, *limited = arms
    for turn in range(rounds):
        seconds: dict[str, float] = {}
        for arm in [*([in_memory] if turn == 0 else []), *(limited if turn % 2 == 0 else reversed(limited))]:
            speed = _read_once(bundle)
            try:
                found = run_arm(arm, bundle)
            except OSError as problem:
                report.line(f"{arm.name}: skipped, {problem}")
                continue
            say(
                f"{arm.name}: first token after {found.notes.prefill_seconds:.2f} s "
                f"(flash read in order before: {speed / 1e9:.1f} GB/s)"
            )
            seconds[arm.name] = found.notes.prefill_seconds
            known = best.setdefault(arm.name, found)
            known.digests |= found.digests
            if found.notes.prefill_seconds < known.notes.prefill_seconds:
                found.digests |= known.digests
                best[arm.name] = found
        if WHOLE_NAME in seconds and EARLY_NAME in seconds:
            pairs.append((seconds[WHOLE_NAME], seconds[EARLY_NAME]))
    return best, pairs


def _read_once(bundle: Bundle) -> float:
    """All experts, past the page cache where that is possible; bytes a second."""
    piece = memoryview(mmap.mmap(-1, PIECE_BYTES))
    layers = expert_layers(bundle, bundle.manifest.layers)
    begin = time.perf_counter()
    for layer in layers:
        descriptor = open_for_reading(layer.path, direct=direct_works([layer.path]))
        try:
            for start in range(0, layer.total_bytes, PIECE_BYTES):
                size = min(PIECE_BYTES, layer.total_bytes - start)
                read_fully(descriptor, piece[:size], layer.first_byte + start)
        finally:
            os.close(descriptor)
    return sum(layer.total_bytes for layer in layers) / (time.perf_counter() - begin)


def _with_loading(result: Result) -> float:
    return result.notes.load_seconds + result.notes.prefill_seconds


def _fewer(result: Result) -> float:
    return result.notes.fewer_bits / max(1, result.notes.hits + result.notes.misses)


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Quality:
    """Of the demo model on held-out text."""

    whole: float
    early: float  # 2 bits at first, upgraded while it runs
    early_share: float  # of uses that were at 2 bits
    first_plane: float  # 2 bits for good
    tokens: int

    def __str__(self) -> str:
        return (
            f"perplexity of the demo model on {self.tokens} held-out tokens: {self.whole:.3f} at 4 bits, "
            f"{self.early:.3f} from 2 bits on ({self.early_share:.1%} of uses were at 2), "
            f"{self.first_plane:.3f} at 2 bits for good"
        )


def _perplexities(report: Report, windows: int, threads: int) -> Quality:
    bundle = Bundle.open(_demo_bundle())
    half = expert_bytes(bundle.manifest, 0, bundle.manifest.num_layers - 1) // 2
    texts = list(held_out_windows(bundle, windows))
    whole, _ = _perplexity(bundle, texts, CacheOptions(half), threads)
    early, share = _perplexity(bundle, texts, CacheOptions(half, start_bits=START_BITS), threads)
    low, _ = _perplexity(bundle, texts, CacheOptions(half, start_bits=START_BITS, upgrades=False), threads)
    quality = Quality(whole, early, share, low, sum(len(text) - 1 for text in texts))
    report.line(f"{quality}; every window began with an empty cache of 50 %")
    return quality


def _perplexity(
    bundle: Bundle, texts: list[tuple[int, ...]], options: CacheOptions, threads: int
) -> tuple[float, float]:
    """(perplexity, share of uses at fewer bits), one token at a time, a fresh cache for each text."""
    surprise = tokens = fewer = uses = 0.0
    for text in texts:
        with _stage(bundle, options, threads) as stage:
            stage.open(_SESSION, len(text))
            for at, (token, wanted) in enumerate(pairwise(text)):
                (logits,) = stage.run(Batch((Span(_SESSION, at, (token,), 1),), None)).astype(np.float64)
                surprise += float(np.logaddexp.reduce(logits) - logits[wanted])
                tokens += 1
            assert stage.experts is not None
            total = stage.experts.statistics.total
            fewer += total.fewer_bits
            uses += total.hits + total.misses
    return math.exp(surprise / tokens), fewer / uses


@contextmanager
def _stage(bundle: Bundle, options: CacheOptions, threads: int) -> Iterator[CpuStage]:
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    stage = CpuStage.load(bundle, layers, threads=threads, kv_budget_bytes=32 << 20, experts=options)
    try:
        yield stage
    finally:
        stage.close()


def _demo_bundle() -> Path:
    path = CACHE / "demo-nested4"
    if not (path / "manifest.sig").exists():
        say(f"exporting {path} (once)")
        from exporters.export import ExportOptions, export_bundle

        export_bundle(DEMO_CHECKPOINT, path, ExportOptions(weights="nested4", name="demo"))
    return path


if __name__ == "__main__":
    main()
