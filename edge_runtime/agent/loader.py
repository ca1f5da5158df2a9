"""From a plan's order to a stage that runs: fetch, check, fit into memory, load on the compute thread.

Knows: the steps and their order. Does not know: leases' fate, links, or which executor makes the stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from edge_runtime.agent.memory import MemoryBudget
from edge_runtime.agent.pipeline_events import Loaded
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.slice_fetcher import Progress, SliceFetcher
from edge_runtime.agent.stage_worker import LoadedStage, StageWorker
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Stage
from edge_runtime.errors import EngineError, ProtocolError
from edge_runtime.protocol.messages import LoadStage


class MakeStage(Protocol):
    def __call__(
        self, bundle: Bundle, layers: LayerRange, *, kv_bytes: int, threads: int, reuse: Stage | None
    ) -> Stage:
        """`reuse` is closed; what it holds of `layers` may be kept. Runs on the compute thread."""
        ...


def cpu_stages(executor: str) -> MakeStage:
    """Stages on this device's processor; `executor` is native, onnx or auto."""

    def make(
        bundle: Bundle, layers: LayerRange, *, kv_bytes: int, threads: int, reuse: Stage | None
    ) -> Stage:
        from edge_runtime.engine.cpu import CpuStage

        kept = reuse if isinstance(reuse, CpuStage) else None
        if reuse is not None and kept is None:
            reuse.close()
        return CpuStage.load(
            bundle, layers, threads=threads, kv_budget_bytes=kv_bytes, executor=executor, reuse=kept
        )

    return make


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
    ) -> None:
        self._fetcher = fetcher
        self._worker = worker
        self._budget = budget
        self._threads = threads
        self._is_row_invariant = is_row_invariant
        self._make_stage = make_stage

    async def load(self, order: LoadStage, progress: Progress) -> tuple[Loaded, Manifest]:
        """Raises the EdgeRuntimeError that says why not: CapacityError, TamperedError, TrustError, EngineError, …"""
        partial = await self._fetcher.manifest(order.bundle)
        manifest = partial.manifest
        check_order(order, manifest)
        kv_bytes = self._budget.kv_bytes(manifest, order.first_layer, order.last_layer)
        blocks = manifest.blocks(order.first_layer, order.last_layer)
        keys = list(dict.fromkeys(key for block in blocks for key in block.slices))
        await self._fetcher.slices(partial, keys, progress)
        total_bytes = sum(manifest.slices[key].size_bytes for key in keys)
        progress("checking", 0, total_bytes)
        bundle = await asyncio.to_thread(partial.open)
        await asyncio.to_thread(bundle.verify, keys)
        progress("loading", 0, total_bytes)
        loaded = await self._worker.call(lambda: self._install(order, bundle, kv_bytes))
        progress("loading", total_bytes, total_bytes)
        return loaded, manifest

    def _install(self, order: LoadStage, bundle: Bundle, kv_bytes: int) -> Loaded:
        """On the compute thread. The stage before, retired but not closed, lends its layers."""
        layers = LayerRange(order.first_layer, order.last_layer)
        reuse = self._worker.take_retired()
        stage = self._make_stage(bundle, layers, kv_bytes=kv_bytes, threads=self._threads, reuse=reuse)
        row_invariant = self._is_row_invariant(bundle, stage)
        vocab_size = bundle.manifest.model.vocab_size
        self._worker.install(
            LoadedStage(
                order.lease,
                stage,
                is_tail=order.stage == len(order.devices) - 1,
                vocab_size=vocab_size,
                queue=RowQueue(order.prefill_chunk_tokens, shared=row_invariant),
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


def check_order(order: LoadStage, manifest: Manifest) -> None:
    """The first stage embeds and the last has the head: layers and places must agree."""
    if not 0 <= order.first_layer <= order.last_layer < manifest.num_layers:
        raise EngineError(
            f"layers {order.first_layer}-{order.last_layer} are not in {manifest.model.name}, "
            f"which has layers 0-{manifest.num_layers - 1}"
        )
    is_first, is_tail = order.stage == 0, order.stage == len(order.devices) - 1
    if is_first != (order.first_layer == 0) or is_tail != (order.last_layer == manifest.num_layers - 1):
        raise ProtocolError(
            f"the plan makes stage {order.stage + 1} of {len(order.devices)} out of "
            f"layers {order.first_layer}-{order.last_layer} of {manifest.num_layers}"
        )
