"""From a plan's order to a stage that runs: fetch, check, fit into memory, load on the compute thread.

Knows: the steps and their order. Does not know: leases' fate, links, or which executor makes the stage.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from edge_runtime.agent.expert_loader import ExpertShareLoader
from edge_runtime.agent.memory import EXPERTS_AUTO, ExpertCacheSetting, MemoryBudget, StageMemory
from edge_runtime.agent.pipeline_events import Loaded
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.slice_fetcher import Progress, SliceFetcher
from edge_runtime.agent.stage_steps import LoadedStage
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.bundle.store import PartialBundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Stage, StageFormats
from edge_runtime.engine.executors import TORCH
from edge_runtime.errors import EngineError, ProtocolError
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_and_peers import FlashAndPeers, HelpedOptions
from edge_runtime.experts.flash_store import expert_bytes
from edge_runtime.experts.peer_runner import PeerOptions
from edge_runtime.experts.prediction_setting import AUTO
from edge_runtime.experts.reader import DEFAULT_LANES
from edge_runtime.experts.start_bits import ALL_BITS, early_quality
from edge_runtime.protocol.messages import HOLDS_EXPERTS, LoadStage

log = logging.getLogger(__name__)

ExpertOptions = CacheOptions | PeerOptions | HelpedOptions


class MakeStage(Protocol):
    def __call__(
        self,
        bundle: Bundle,
        layers: LayerRange,
        *,
        kv_bytes: int,
        threads: int,
        reuse: Stage | None,
        experts: ExpertOptions | None,
        formats: StageFormats,
    ) -> Stage:
        """`reuse` is closed; what it holds of `layers` may be kept. `experts`: keep them on flash, behind such a cache,
        or share them with others. Runs on the compute thread."""
        ...


def cpu_stages(executor: str) -> MakeStage:
    """Stages on this device's processor; `executor` is native, onnx or auto."""

    def make(
        bundle: Bundle,
        layers: LayerRange,
        *,
        kv_bytes: int,
        threads: int,
        reuse: Stage | None,
        experts: ExpertOptions | None,
        formats: StageFormats,
    ) -> Stage:
        from edge_runtime.engine.cpu import CpuStage

        kept = reuse if isinstance(reuse, CpuStage) else None
        if reuse is not None and kept is None:
            reuse.close()
        return CpuStage.load(
            bundle,
            layers,
            threads=threads,
            kv_budget_bytes=kv_bytes,
            executor=executor,
            reuse=kept,
            experts=experts,
            formats=formats,
        )

    return make


def torch_stages() -> MakeStage:
    """Stages on a CUDA device, or on the processor as a reference. All weights are in the device's memory."""

    def make(
        bundle: Bundle,
        layers: LayerRange,
        *,
        kv_bytes: int,
        threads: int,
        reuse: Stage | None,
        experts: ExpertOptions | None,
        formats: StageFormats,
    ) -> Stage:
        from edge_runtime.engine.torch_stage.stage import TorchStage

        if experts is not None:
            raise EngineError(
                "the torch executor holds all experts of its layers in the device's memory",
                hint="use --expert-cache all, or --executor native to share them",
            )
        kept = reuse if isinstance(reuse, TorchStage) else None
        if reuse is not None and kept is None:
            reuse.close()
        return TorchStage.load(bundle, layers, kv_budget_bytes=kv_bytes, reuse=kept, formats=formats)

    return make


def device_stages(executor: str) -> MakeStage:
    """`executor` as `engine.executors.device_executor` says."""
    return torch_stages() if executor == TORCH else cpu_stages(executor)


class StageLoader:
    """`is_row_invariant(bundle digest, stage)` says what the probe found, for StageReady and for sharing batches."""

    def __init__(
        self,
        fetcher: SliceFetcher,
        worker: StageWorker,
        budget: MemoryBudget,
        threads: int,
        is_row_invariant: Callable[[Bundle, Stage], bool],
        make_stage: MakeStage,
        expert_cache: ExpertCacheSetting = EXPERTS_AUTO,
        flash_lanes: Callable[[Manifest, str], int] = lambda manifest, bundle: DEFAULT_LANES,
        shares: ExpertShareLoader | None = None,
        start_bits: int = ALL_BITS,
        expert_prediction: str = AUTO,
    ) -> None:
        self._fetcher = fetcher
        self._worker = worker
        self._budget = budget
        self._threads = threads
        self._is_row_invariant = is_row_invariant
        self._make_stage = make_stage
        self._expert_setting = expert_cache
        self._flash_lanes = flash_lanes
        self._shares = shares
        self._start_bits = start_bits
        self._expert_prediction = expert_prediction
        self.expert_cache: ExpertCache | None = None  # of the stage loaded last
        self._helped: FlashAndPeers | None = None  # of it, too, where peers may help
        self.early_quality = (
            ""  # what it may cost that it uses experts before they are whole; "": it does not
        )

    @property
    def peers_say(self) -> str:
        """What other devices did for the experts of the stage loaded last."""
        return "" if self._helped is None else self._helped.says

    async def load(self, order: LoadStage, progress: Progress) -> tuple[Loaded, Manifest]:
        """Raises the EdgeRuntimeError that says why not: CapacityError, TamperedError, TrustError, EngineError, …"""
        partial = await self._fetcher.manifest(order.bundle)
        manifest = partial.manifest
        check_order(order, manifest)
        if order.stage == HOLDS_EXPERTS or (order.shares and not order.experts_on_flash):
            return await self._load_shared(order, partial, progress), manifest
        memory = self._budget.divide(manifest, order.first_layer, order.last_layer, self._expert_setting)
        blocks = manifest.blocks(order.first_layer, order.last_layer)
        keys = list(dict.fromkeys(key for block in blocks for key in block.slices))
        await self._fetcher.slices(partial, keys, progress)
        total_bytes = sum(manifest.slices[key].size_bytes for key in keys)
        progress("checking", 0, total_bytes)
        bundle = await asyncio.to_thread(partial.open)
        on_flash: set[str] = set()
        if memory.expert_cache_bytes is not None:  # these are checked expert by expert, whenever one is read
            on_flash.update(key for block in blocks for key in manifest.expert_slices(block))
            _say_what_stays_on_flash(order, manifest, memory.expert_cache_bytes)
            _say_what_begins_early(order, manifest, self._start_bits)
        await asyncio.to_thread(bundle.verify, [key for key in keys if key not in on_flash])
        progress("loading", 0, total_bytes)
        experts: ExpertOptions | None = self._cache_options(order.bundle, manifest, memory)
        if order.shares and self._shares is not None and isinstance(experts, CacheOptions):
            experts = self._shares.helped(order, partial, experts)
        loaded = await self._worker.call(lambda: self._install(order, bundle, memory.kv_bytes, experts))
        if self._shares is not None and self._helped is not None:
            await self._shares.open(order, self._helped)
        progress("loading", total_bytes, total_bytes)
        return loaded, manifest

    async def _load_shared(self, order: LoadStage, partial: PartialBundle, progress: Progress) -> Loaded:
        """Dense weights as ever, and this device's own experts; or only those."""
        if self._shares is None:
            raise EngineError("this device does not share experts")
        self.expert_cache = self._helped = None
        if order.stage == HOLDS_EXPERTS:
            return await self._shares.hold(order, partial, progress)
        manifest = partial.manifest
        blocks = manifest.blocks(order.first_layer, order.last_layer)
        experts = {key for block in blocks for key in manifest.expert_slices(block)}
        keys = [key for block in blocks for key in block.slices if key not in experts]
        options = self._shares.options(order, partial)
        kv_bytes = self._budget.kv_beside(
            manifest, order.first_layer, order.last_layer, options.store.held_bytes
        )
        await self._fetcher.slices(partial, list(dict.fromkeys(keys)), progress)
        bundle = await asyncio.to_thread(partial.open)
        await asyncio.to_thread(bundle.verify, keys)
        loaded = await self._worker.call(lambda: self._install(order, bundle, kv_bytes, options))
        await self._shares.begin(order, partial, options, progress)
        return loaded

    def _cache_options(self, bundle: str, manifest: Manifest, memory: StageMemory) -> CacheOptions | None:
        if memory.expert_cache_bytes is None:
            return None
        loop = asyncio.get_running_loop()

        def refetch(key: str, offset_bytes: int, length_bytes: int) -> bytes:
            """On a thread that reads: the event loop fetches."""
            reading = self._fetcher.read(bundle, key, offset_bytes, length_bytes)
            return asyncio.run_coroutine_threadsafe(reading, loop).result()

        lanes = self._flash_lanes(manifest, bundle)
        return CacheOptions(
            memory.expert_cache_bytes,
            lanes=lanes,
            refetch=refetch,
            start_bits=self._start_bits,
            prediction=self._expert_prediction,
        )

    def _install(
        self, order: LoadStage, bundle: Bundle, kv_bytes: int, experts: ExpertOptions | None
    ) -> Loaded:
        """On the compute thread. The stage before, retired but not closed, lends its layers."""
        layers = LayerRange(order.first_layer, order.last_layer)
        reuse = self._worker.take_retired()
        stage = self._make_stage(
            bundle,
            layers,
            kv_bytes=kv_bytes,
            threads=self._threads,
            reuse=reuse,
            experts=experts,
            formats=StageFormats(kv=order.kv, wire=order.wire),
        )
        row_invariant = self._is_row_invariant(bundle, stage)
        self.expert_cache = _expert_cache_of(stage)
        helped = getattr(stage, "peer_experts", None)
        self._helped = helped if isinstance(helped, FlashAndPeers) else None
        if self.expert_cache is not None:
            self.expert_cache.statistics.reset()  # what the probe asked for says nothing
        is_early = self.expert_cache is not None and self.expert_cache.is_lossy
        self.early_quality = early_quality(bundle.manifest.quality, self._start_bits) if is_early else ""
        vocab_size = bundle.manifest.model.vocab_size
        self._worker.install(
            LoadedStage(
                order.lease,
                stage,
                is_tail=order.stage == len(order.devices) - 1,
                vocab_size=vocab_size,
                queue=RowQueue(order.prefill_chunk_tokens, shared=row_invariant),
                is_first=order.stage == 0,
            )
        )
        return Loaded(
            order.lease,
            stage.numeric_class,
            row_invariant,
            stage.weight_bytes,
            stage.kv_capacity_tokens,
            vocab_size,
        )


def _expert_cache_of(stage: Stage) -> ExpertCache | None:
    found = getattr(stage, "experts", None)
    return found if isinstance(found, ExpertCache) else None


def _say_what_stays_on_flash(order: LoadStage, manifest: Manifest, cache_bytes: int) -> None:
    total_bytes = expert_bytes(manifest, order.first_layer, order.last_layer)
    log.info(
        "lease %d: experts stay on flash: a cache of %.1f MiB for %.1f MiB of them (%.0f %%)",
        order.lease,
        cache_bytes / (1 << 20),
        total_bytes / (1 << 20),
        100 * cache_bytes / max(1, total_bytes),
    )


def _say_what_begins_early(order: LoadStage, manifest: Manifest, start_bits: int) -> None:
    if start_bits == ALL_BITS:
        return
    if start_bits not in manifest.prefix_bits:
        log.warning(
            "lease %d: --expert-start-bits %d changes nothing for %s: its experts are whole or not there "
            "(edge-runtime export --weights nested8 writes them in planes of 2, 2 and 4 bits, nested4 of 2 and 2)",
            order.lease,
            start_bits,
            manifest.model.name,
        )
        return
    log.warning(
        "lease %d: experts are used from %d bits on and completed later: tokens depend on when reads end; %s",
        order.lease,
        start_bits,
        early_quality(manifest.quality, start_bits),
    )


def check_order(order: LoadStage, manifest: Manifest) -> None:
    """The first stage embeds and the last has the head: layers and places must agree."""
    if not 0 <= order.first_layer <= order.last_layer < manifest.num_layers:
        raise EngineError(
            f"layers {order.first_layer}-{order.last_layer} are not in {manifest.model.name}, "
            f"which has layers 0-{manifest.num_layers - 1}"
        )
    if order.stage == HOLDS_EXPERTS:
        return
    is_first, is_tail = order.stage == 0, order.stage == len(order.devices) - 1
    if is_first != (order.first_layer == 0) or is_tail != (order.last_layer == manifest.num_layers - 1):
        raise ProtocolError(
            f"the plan makes stage {order.stage + 1} of {len(order.devices)} out of "
            f"layers {order.first_layer}-{order.last_layer} of {manifest.num_layers}"
        )
