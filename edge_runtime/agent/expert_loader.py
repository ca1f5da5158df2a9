"""Loading where devices share experts: each fetches and holds its own, and nobody a whole layer's.

Knows: shares, where single experts come from (this device's flash, else the coordinator), the order of steps. Does not
know: dense weights, plans' fate, links beyond "have one".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator

from edge_runtime.agent.expert_links import ExpertLinks
from edge_runtime.agent.memory import MemoryBudget
from edge_runtime.agent.pipeline_events import Loaded
from edge_runtime.agent.slice_fetcher import Progress, SliceFetcher
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.bundle.manifest import Block, Manifest
from edge_runtime.bundle.store import PartialBundle
from edge_runtime.engine.base import StageFormats
from edge_runtime.errors import EdgeRuntimeError, EngineError, TamperedError, first_of
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_and_peers import FlashAndPeers, HelpedOptions
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers
from edge_runtime.experts.peer_runner import PeerOptions, peers_of
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.experts.peer_shares import held_by, holders_of, owners_of
from edge_runtime.experts.peer_store import PeerStore
from edge_runtime.protocol.messages import LoadStage

log = logging.getLogger(__name__)

FETCHES_AHEAD = 4
FORMATS = ("fp32", "int8", "int4", "nested4", "nested8")

NumericClass = Callable[[Manifest, StageFormats], str]


class ExpertShareLoader:
    def __init__(
        self,
        fetcher: SliceFetcher,
        worker: StageWorker,
        budget: MemoryBudget,
        threads: int,
        device_id: str,
        links: ExpertLinks,
        numeric_class: NumericClass,
    ) -> None:
        self._fetcher, self._worker, self._budget = fetcher, worker, budget
        self._threads, self._device_id, self._links = threads, device_id, links
        self._numeric_class = numeric_class

    def options(self, order: LoadStage, partial: PartialBundle) -> PeerOptions:
        """The experts of a stage, its own not yet in memory. Raises ProtocolError, BundleError, EngineError."""
        layers = _layers(order, partial)
        counts = {layer.layer: layer.experts for layer in layers}
        store = PeerStore(layers, held_by(order.shares, self._device_id, counts))
        return PeerOptions(store, owners_of(order.shares, self._device_id, counts), self._links)

    async def begin(
        self, order: LoadStage, partial: PartialBundle, options: PeerOptions, progress: Progress
    ) -> None:
        """After this the stage may run: its own experts are here, and the others within reach."""
        await self._fill(options.store, partial, progress)
        peers = peers_of(options.owners)
        await self._on_links(self._links.reach(peers))
        await self._worker.call(lambda: self._links.begin(order.lease))
        log.info(
            "lease %d: holds %.1f of %.1f MiB of experts, the rest is on %d other devices",
            order.lease,
            options.store.held_bytes / (1 << 20),
            options.store.total_bytes / (1 << 20),
            len(peers),
        )

    def helped(self, order: LoadStage, partial: PartialBundle, cache: CacheOptions) -> HelpedOptions:
        """Experts on this device's flash, where others have some in memory. Raises ProtocolError."""
        counts = {layer.layer: layer.experts for layer in _layers(order, partial)}
        return HelpedOptions(cache, holders_of(order.shares, self._device_id, counts), self._links)

    async def open(self, order: LoadStage, experts: FlashAndPeers) -> None:
        """From now on others may be asked; who can't be reached is done without."""
        reached = 0
        for device_id in experts.peers:
            try:
                await self._on_links(self._links.reach([device_id]))
                reached += 1
            except EdgeRuntimeError as problem:
                log.warning("device %s can't help with experts: %s", device_id[:8], problem.message)
        await self._worker.call(lambda: self._links.begin(order.lease))
        await self._worker.call(experts.open)
        log.info("lease %d: %d other devices may be asked for experts instead of flash", order.lease, reached)

    async def hold(self, order: LoadStage, partial: PartialBundle, progress: Progress) -> Loaded:
        """Experts and nothing else. Raises CapacityError before a byte is fetched, else as `options`."""
        manifest, layers = partial.manifest, _layers(order, partial)
        held = held_by(order.shares, self._device_id, {layer.layer: layer.experts for layer in layers})
        stride_bytes = {layer.layer: layer.stride_bytes for layer in layers}
        held_bytes = sum(len(experts) * stride_bytes[layer] for layer, experts in held.items())
        self._budget.check_held(held_bytes)
        await self._worker.call(self._free_stage)
        store = PeerStore(layers, held)
        await self._fill(store, partial, progress)
        server = PeerServer(store, _activations(_blocks(order, manifest)), threads=self._threads)
        await self._worker.call(lambda: self._links.begin(order.lease, server, order.devices))
        log.info("lease %d: holds %.1f MiB of experts for others", order.lease, held_bytes / (1 << 20))
        numeric_class = self._numeric_class(manifest, StageFormats(kv=order.kv, wire=order.wire))
        return Loaded(order.lease, numeric_class, True, held_bytes, 0, manifest.model.vocab_size)

    def _free_stage(self) -> None:
        stage = self._worker.take_retired()
        if stage is not None:
            stage.close()

    async def _on_links(self, work: Coroutine[None, None, None]) -> None:
        await asyncio.wrap_future(self._worker.beside(work))

    # ------------------------------------------------------------ bytes

    async def _fill(self, store: PeerStore, partial: PartialBundle, progress: Progress) -> None:
        """Raises TamperedError (names layer and expert), BundleError, TransportError."""
        done_bytes, wanted = 0, store.experts()

        async def bring_some() -> None:
            nonlocal done_bytes
            for layer, expert in wanted:
                await self._bring(store, partial, layer, expert)
                done_bytes += layer.stride_bytes
                progress("loading", done_bytes, store.held_bytes)

        await _all_of(bring_some() for _ in range(FETCHES_AHEAD))

    async def _bring(self, store: PeerStore, partial: PartialBundle, layer: ExpertLayer, expert: int) -> None:
        start, size = layer.offset(expert), layer.stride_bytes
        here = await asyncio.to_thread(partial.read_some, layer.slice, start, size)
        if await asyncio.to_thread(store.put, layer.layer, expert, here):
            return
        data = await self._fetcher.read(str(partial.digest), layer.slice, start, size)
        if not await asyncio.to_thread(store.put, layer.layer, expert, data):
            raise TamperedError(
                f"expert {expert} of layer {layer.layer} (slice {layer.slice}) does not match the signed manifest",
                hint="the sender's copy is damaged or was changed: check it with edge-runtime doctor",
            )
        await asyncio.to_thread(partial.write_some, layer.slice, start, data)


async def _all_of(work: Iterator[Coroutine[None, None, None]]) -> None:
    """The first failure of ours ends the others, and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
    except* EdgeRuntimeError as problems:
        raise first_of(problems) from None


def _blocks(order: LoadStage, manifest: Manifest) -> tuple[Block, ...]:
    return manifest.layers[order.first_layer : order.last_layer + 1]


def _layers(order: LoadStage, partial: PartialBundle) -> tuple[ExpertLayer, ...]:
    layers = expert_layers(partial.open(), _blocks(order, partial.manifest), files=False)
    for layer in layers:
        if layer.format not in FORMATS:
            raise EngineError(f"experts of format {layer.format} can't be shared", hint="export them as int4")
    return layers


def _activations(blocks: tuple[Block, ...]) -> dict[int, str]:
    return {
        int(block.name.rpartition(".")[2]): str(operation.attributes["activation"])
        for block in blocks
        for operation in block.operations
        if operation.kind == "experts"
    }
