"""What this device can do with a bundle, measured on its last layer and head, and kept so that a restart is quick.

Knows: what to fetch for a measurement, and when an old one still holds. Does not know: links, plans, how it is measured
(`engine.probe`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edge_runtime.agent.loader import device_stages
from edge_runtime.agent.memory import (
    EXPERTS_ALL,
    EXPERTS_AUTO,
    SCRATCH_BYTES,
    ExpertCacheSetting,
    MemoryBudget,
    StageMemory,
)
from edge_runtime.agent.slice_fetcher import Progress, SliceFetcher
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import DEFAULT_FORMATS, Stage, StageFormats
from edge_runtime.engine.numeric_class import early_class, is_early_class, plain_class
from edge_runtime.errors import CapacityError
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_probe import measure_flash
from edge_runtime.experts.flash_store import can_stay_on_flash, expert_layers
from edge_runtime.experts.reader import DEFAULT_LANES
from edge_runtime.experts.start_bits import ALL_BITS
from edge_runtime.protocol.messages import ProfileReport

log = logging.getLogger(__name__)

PROBE_KV_TOKENS = 1024
MAX_KEPT = 64


@dataclass(frozen=True, slots=True)
class Measurement:
    numeric_class: str
    row_invariant: bool
    why_not: str
    layer_decode_seconds: float
    layer_prefill_row_seconds: float
    head_seconds: float
    flash_bytes_per_second: float = 0.0  # experts can't stay on flash, or there are none
    flash_lanes: int = DEFAULT_LANES


class MeasurementCache:
    """A small file. A damaged one only costs the time to measure again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, Measurement] = {}
        try:
            for key, fields in json.loads(path.read_text(encoding="utf-8")).items():
                self._kept[str(key)] = Measurement(**fields)
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, AttributeError) as problem:
            log.warning("%s is damaged and not used: %s", path, problem)
            self._kept = {}

    def get(self, bundle: str, numeric_class: str, threads: int) -> Measurement | None:
        return self._kept.get(f"{bundle} {numeric_class} {threads}")

    def put(self, bundle: str, threads: int, found: Measurement) -> None:
        self._kept[f"{bundle} {found.numeric_class} {threads}"] = found
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps({key: asdict(kept) for key, kept in self._kept.items()}, indent=1))
        temporary.rename(self._path)


class DeviceProfiler:
    def __init__(
        self,
        fetcher: SliceFetcher,
        worker: StageWorker,
        budget: MemoryBudget,
        executor: str,
        threads: int,
        cache: MeasurementCache,
        expert_cache: ExpertCacheSetting = EXPERTS_AUTO,
        start_bits: int = ALL_BITS,
    ) -> None:
        self._expert_cache = expert_cache
        self._start_bits = start_bits
        self._fetcher = fetcher
        self._worker = worker
        self._budget = budget
        self._executor = executor  # native, onnx or torch; auto: native or onnx
        self._threads = threads
        self._cache = cache

    async def report(self, digest: str, progress: Progress) -> ProfileReport:
        """Fetch what has to be measured, unless it was. Raises the EdgeRuntimeError that says why it can't be."""
        partial = await self._fetcher.manifest(digest)
        found = self._cache.get(digest, self._numeric_class(partial.manifest), self._threads)
        if found is None:
            layers, memory = self._what_fits(partial.manifest)
            blocks = partial.manifest.blocks(layers.first, layers.last)
            keys = list(dict.fromkeys(key for block in blocks for key in block.slices))
            await self._fetcher.slices(partial, keys, progress)
            bundle = await asyncio.to_thread(partial.open)
            found = await self._worker.call(lambda: self._measure(bundle, layers, memory))
        return ProfileReport(
            bundle=digest,
            numeric_class=self._promised_class(partial.manifest, found.numeric_class),
            row_invariant=found.row_invariant,
            layer_decode_seconds=found.layer_decode_seconds,
            layer_prefill_row_seconds=found.layer_prefill_row_seconds,
            head_seconds=found.head_seconds,
            memory_free_bytes=self._budget.free_bytes,
            overhead_bytes=self._budget.overhead_bytes + SCRATCH_BYTES,
            flash_bytes_per_second=0.0 if self._expert_cache == EXPERTS_ALL else found.flash_bytes_per_second,
            expert_cache_bytes=self._expert_cache if isinstance(self._expert_cache, int) else 0,
        )

    def flash_lanes(self, manifest: Manifest, bundle: str) -> int:
        """How many reads at a time flash wants, as far as it was measured with this bundle."""
        found = self._cache.get(bundle, self._numeric_class(manifest), self._threads)
        return DEFAULT_LANES if found is None else found.flash_lanes

    def is_row_invariant(self, bundle: Bundle, stage: Stage) -> bool:
        """Of a stage just loaded; measured now where it was not before. On the compute thread."""
        found = self._cache.get(str(bundle.digest), plain_class(stage.numeric_class), self._threads)
        if found is None and (
            getattr(stage, "peer_experts", None) is not None or is_early_class(stage.numeric_class)
        ):
            return False  # it can't run alone, or twice alike: careful, until a whole layer was measured
        return found.row_invariant if found is not None else self._probe(bundle, stage).row_invariant

    def _promised_class(self, manifest: Manifest, numeric_class: str) -> str:
        """Stages of this device may turn out exact where all experts fit into memory; it is not promised."""
        is_early = self._start_bits in manifest.prefix_bits and self._expert_cache != EXPERTS_ALL
        return early_class(numeric_class) if is_early else numeric_class

    def _numeric_class(self, manifest: Manifest) -> str:
        return self.numeric_class(manifest, DEFAULT_FORMATS)

    def numeric_class(self, manifest: Manifest, formats: StageFormats) -> str:
        """Of stages of this device."""
        from edge_runtime.engine.executors import TORCH, chosen_executor, numeric_class_of

        executor = self._executor if self._executor == TORCH else chosen_executor(self._executor)
        return numeric_class_of(executor, manifest.model.weights, formats)

    def _what_fits(self, manifest: Manifest) -> tuple[LayerRange, StageMemory]:
        """The last layer with the head; a middle layer alone on a device too small for the head."""
        last, middle = manifest.num_layers - 1, (manifest.num_layers - 1) // 2
        token_bytes = manifest.model.kv_bytes_per_token_per_layer
        try:
            layer, memory = last, self._divide(manifest, last)
        except CapacityError:
            if manifest.num_layers < 3:
                raise
            layer, memory = middle, self._divide(manifest, middle)
        kv_bytes = min(memory.kv_bytes, PROBE_KV_TOKENS * token_bytes)
        return LayerRange(layer, layer), replace(memory, kv_bytes=kv_bytes)

    def _divide(self, manifest: Manifest, layer: int) -> StageMemory:
        """All experts of the one layer in memory where they fit: what is measured is computing, not flash."""
        try:
            return self._budget.divide(manifest, layer, layer, EXPERTS_AUTO)
        except CapacityError:
            return self._budget.divide(manifest, layer, layer, self._expert_cache)

    def _measure(self, bundle: Bundle, layers: LayerRange, memory: StageMemory) -> Measurement:
        """On the compute thread, so that no step runs beside it."""
        stage = device_stages(self._executor)(
            bundle,
            layers,
            kv_bytes=memory.kv_bytes,
            threads=self._threads,
            reuse=None,
            experts=None if memory.expert_cache_bytes is None else CacheOptions(memory.expert_cache_bytes),
            formats=DEFAULT_FORMATS,
        )
        try:
            return self._probe(bundle, stage)
        finally:
            stage.close()

    def _probe(self, bundle: Bundle, stage: Stage) -> Measurement:
        from edge_runtime.engine.cpu import CpuStage
        from edge_runtime.engine.probe import ProbedStage, probe

        if not isinstance(stage, CpuStage | ProbedStage):
            return Measurement(stage.numeric_class, True, "", 0.0, 0.0, 0.0)
        result = probe(stage)
        manifest = bundle.manifest
        head_seconds = result.head_seconds or _head_by_size(manifest, result.layer_decode_seconds)
        found = Measurement(
            result.numeric_class,
            result.row_invariant,
            result.why_not,
            result.layer_decode_seconds,
            result.layer_prefill_row_seconds,
            head_seconds if manifest.model.kind == "generator" else 0.0,
            *_flash(bundle, stage.layers),
        )
        if not found.row_invariant:
            log.warning("rows depend on their neighbours on this device: %s", found.why_not)
        log.info(
            "measured %s: %.3f ms a row and layer, %.3f ms in a chunk, head %.3f ms",
            found.numeric_class,
            found.layer_decode_seconds * 1e3,
            found.layer_prefill_row_seconds * 1e3,
            found.head_seconds * 1e3,
        )
        if stage.layers.last == manifest.num_layers - 1:  # with the head, where rows could differ too
            self._cache.put(str(bundle.digest), self._threads, found)
        return found


def _flash(bundle: Bundle, layers: LayerRange) -> tuple[float, int]:
    """(bytes a second, lanes) of single experts, where these may stay on flash."""
    manifest = bundle.manifest
    is_possible = can_stay_on_flash(manifest, layers.first, layers.last)
    experts = expert_layers(bundle, manifest.layers[layers.first : layers.last + 1]) if is_possible else ()
    if not experts:
        return 0.0, DEFAULT_LANES
    try:
        speed = measure_flash(experts)
    except OSError as problem:
        log.warning("flash could not be measured: %s", problem)
        return 0.0, DEFAULT_LANES
    log.info(
        "flash gives experts at %.2f GB/s with %d reads at a time", speed.bytes_per_second / 1e9, speed.lanes
    )
    return speed.bytes_per_second, speed.lanes


def _head_by_size(manifest: Manifest, layer_seconds: float) -> float:
    """Decoding reads every weight once: seconds go with bytes."""
    return layer_seconds * manifest.head.weight_bytes / max(1, manifest.layers[-1].weight_bytes)
