"""The CPU stage: segments on either executor, with our own attention and experts between them.

A row's result depends on its own session's history alone, bit for bit, whatever else is in the batch.
Knows: blocks, KV memory, ragged batches. Does not know: links, leases, sampling, other stages.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block, ModelInfo
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import DEFAULT_FORMATS, KV_FORMATS, Batch, Rows, StageFormats
from edge_runtime.engine.blocks import LoadedBlock, run_context
from edge_runtime.engine.cut_operations import RopeTables
from edge_runtime.engine.executors import AUTO, chosen_executor, numeric_class_of
from edge_runtime.engine.kv_cache import KvCache, KvShape
from edge_runtime.engine.layer_chain import Runner, can_chain, chained
from edge_runtime.engine.numeric_class import early_class
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.engine.resident import return_free_memory
from edge_runtime.engine.rope import rope_tables
from edge_runtime.engine.side_pages import Tables, side_pages
from edge_runtime.engine.spans import StageShape, check_batch, check_open
from edge_runtime.engine.wire import FP32, check_wire, rounded
from edge_runtime.errors import CapacityError, EdgeRuntimeError, EngineError
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_and_peers import FlashAndPeers, HelpedOptions
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.experts.next_gate import next_gates
from edge_runtime.experts.peer_runner import PeerExperts, PeerOptions
from edge_runtime.experts.prediction_setting import OFF
from edge_runtime.experts.reader import Cancelled

ExpertOptions = CacheOptions | PeerOptions | HelpedOptions
ExpertsApart = ExpertCache | PeerExperts | FlashAndPeers  # not mapped

_NO_ROWS = np.zeros((0, 0), np.float32)


class CpuStage:
    """A Stage on this device's processor. Make one with `load`. `run` releases the GIL while it computes."""

    def __init__(
        self,
        bundle: Bundle,
        layers: LayerRange,
        executor: str,
        blocks: dict[str, LoadedBlock],
        cache: KvCache,
        experts: ExpertsApart | None = None,
        formats: StageFormats = DEFAULT_FORMATS,
    ) -> None:
        manifest = bundle.manifest
        self.layers = layers
        self.executor = executor
        self.numeric_class = numeric_class_of(executor, manifest.model.weights, formats)
        self.weight_bytes = manifest.stage_weight_bytes(layers.first, layers.last)
        if experts is not None:
            self.weight_bytes += experts.arena_bytes - experts.total_bytes
        # Both None: all experts are mapped. Both there: peers may be faster than flash.
        self.experts = experts.cache if isinstance(experts, FlashAndPeers) else _cache_of(experts)
        self.peer_experts = None if isinstance(experts, ExpertCache) else experts
        if self.experts is not None and self.experts.is_lossy:
            self.numeric_class = early_class(self.numeric_class)
        self.bundle_digest = bundle.digest
        self._shape = StageShape(manifest.model, layers, manifest.num_layers)
        self._blocks = blocks
        self._cache = cache
        self._wire = formats.wire
        self._rounds_after = self._shape.boundaries if formats.wire != FP32 else frozenset()
        self.ropes = _ropes(bundle, cache)
        self._apart: list[Runner] = list(blocks.values())
        # A format that rounds between layers needs them one by one.
        self._chained = (
            self._apart
            if self._rounds_after
            else chained(blocks, executor, self.ropes, manifest.model.hidden_size)
        )
        self._closed = False
        self._running_lock = threading.Lock()  # of the two below
        self._running: SessionId | None = None  # whose batch runs now, where it is one session's
        self._given_up = False

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        layers: LayerRange,
        *,
        threads: int,
        kv_budget_bytes: int,
        executor: str = AUTO,
        reuse: CpuStage | None = None,
        experts: ExpertOptions | None = None,
        formats: StageFormats = DEFAULT_FORMATS,
    ) -> CpuStage:
        """Load the blocks of `layers`. `executor` is native, onnx or auto (`engine/executors.py`).

        `reuse` is closed, and its blocks are kept where they are wanted again. `experts`: a cache of that many bytes
        in front of flash, or devices that share them, instead of mapping all experts.

        Raises EngineError (a graph that can't be compiled, layers that don't exist), CapacityError (a budget that
        does not hold one page of KV, or one token's experts) or BundleError (experts that can't stay on flash).
        """
        if threads < 1:
            raise EngineError(f"a stage computes with at least 1 thread, not {threads}")
        executor = chosen_executor(executor)
        check_wire(formats.wire)
        if formats.kv not in KV_FORMATS:
            raise EngineError(f"there is no KV format {formats.kv!r}", hint="choose fp32 or int8")
        StageShape(bundle.manifest.model, layers, bundle.manifest.num_layers)  # layers exist
        wanted = bundle.manifest.blocks(layers.first, layers.last)
        cache = _make_cache(wanted, kv_budget_bytes, layers, formats.kv)
        kept = reuse.release_blocks(bundle.digest, executor, threads) if reuse is not None else {}
        # Forget what is not wanted before loading more: the two need not fit together.
        kept = {block.name: kept[block.name] for block in wanted if block.name in kept}
        expert_cache = _make_expert_cache(bundle, wanted, experts)
        try:
            blocks = {}
            for block in wanted:
                if block.name in kept:
                    blocks[block.name] = kept[block.name]
                    blocks[block.name].use_experts(bundle, expert_cache)
                else:
                    blocks[block.name] = LoadedBlock(bundle, block, executor, threads, expert_cache)
            return_free_memory()
            return cls(bundle, layers, executor, blocks, cache, expert_cache, formats)
        except BaseException:
            if expert_cache is not None:
                expert_cache.close()
            raise

    @property
    def model(self) -> ModelInfo:
        return self._shape.model

    @property
    def blocks(self) -> Mapping[str, LoadedBlock]:
        """By name, in order; for probes."""
        return self._blocks

    @property
    def kv_shape(self) -> KvShape:
        return self._cache.shape

    @property
    def kv_capacity_tokens(self) -> int:
        return self._cache.table.capacity_tokens

    @property
    def kv_used_tokens(self) -> int:
        """Reserved by open sessions, in whole pages."""
        return self._cache.table.reserved_tokens

    @property
    def spare_pages(self) -> int:
        return self._cache.table.spare_pages

    @property
    def kv_committed_bytes(self) -> int:
        return self._cache.committed_bytes

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        self._check_usable()
        check_open(self._shape, session, max_rows)
        return self._cache.open(session, max_rows, page_names)

    def keep(
        self, session: SessionId, first_page: int, page_names: Sequence[bytes], ids: Sequence[int]
    ) -> None:
        if session in self._cache.table:
            self._cache.keep(session, first_page, page_names, ids)

    def give_back(self, *, all_pages: bool = False) -> None:
        if all_pages:
            self._cache.give_up_resting()
        else:
            self._cache.grow_older()

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        if session not in self._cache.table:
            return
        if from_row > 0:
            self._cache.truncate(session, from_row)
        else:
            self._cache.drop(session)

    def give_up(self, session: SessionId) -> None:
        """From any thread, before `drop`: a batch of this session alone that runs now fails (Cancelled) at its next
        layer, and reads of experts for it that have not begun are left out."""
        with self._running_lock:  # no other batch begins meanwhile: it would be hit instead
            if self._running != session:
                return
            self._given_up = True
            if self.experts is not None:
                self.experts.cancel()

    def rows(self, session: SessionId) -> int:
        """How many rows of the session this stage holds."""
        return self._cache.table.get(session).rows

    def close(self) -> None:
        for experts in (self.peer_experts, self.experts):
            if experts is not None:
                experts.close()
        self._cache.close()
        self._blocks = {}
        self._apart = self._chained = []
        self._closed = True

    def release_blocks(self, digest: str, executor: str, threads: int) -> dict[str, LoadedBlock]:
        """Close this stage and hand over its blocks, where they are of that bundle, executor and number of threads."""
        is_same = (digest, executor) == (self.bundle_digest, self.executor)
        kept = {name: block for name, block in self._blocks.items() if block.threads == threads}
        self.close()
        return kept if is_same else {}

    def run(self, batch: Batch) -> Rows:
        self._check_usable()
        if not batch.spans:
            raise EngineError("a batch without spans")
        check_batch(batch, self._shape, self._cache.table)
        for span in batch.spans:
            self._cache.append(span.session, span.base_row, len(span.ids))
        try:
            self._set_running({span.session for span in batch.spans})
            try:
                with side_pages(self._cache, batch.spans) as sides:
                    rows = self._run_checked(batch, sides)
            finally:
                self._set_running(set())
        except Exception as error:
            # The sessions hold rows that were not computed: forget them, and they can be sent again.
            for span in batch.spans:
                self._cache.truncate(span.session, span.base_row)
            if isinstance(error, EdgeRuntimeError):
                raise
            raise EngineError(f"layers {self.layers} could not run a batch: {error}") from error
        for span in batch.spans:
            self._cache.ran(span.session, span.base_row, span.ids)
        return rows

    def _run_checked(self, batch: Batch, sides: Tables) -> Rows:
        """Experts from flash may be used before they are checked, and everything be computed again: rows of the cache
        are written anew, and what is made of them is not seen before."""
        if self.experts is None:
            return self._run_blocks(batch, sides)
        return self.experts.run_checked(lambda: self._run_blocks(batch, sides))

    def _run_blocks(self, batch: Batch, sides: Tables) -> Rows:
        context = run_context(batch.spans, self._cache, self.ropes, sides)
        wants_logits = self._shape.is_tail and self._shape.model.kind == "generator"
        hidden = _NO_ROWS if batch.hidden is None else batch.hidden
        if not (hidden.flags.c_contiguous and hidden.flags.aligned):
            hidden = hidden.copy()
        kv_layer = 0
        for block in self._chained if can_chain(context) else self._apart:
            if self._given_up:
                raise Cancelled("the session has gone")
            if block.name == "head" and wants_logits:
                hidden = hidden[
                    context.layout.logit_rows
                ]  # the head is the costliest block: only rows asked for
                if not len(hidden):
                    return np.zeros((0, self._shape.model.vocab_size), np.float32)
            hidden = block.run(hidden, context, kv_layer)
            kv_layer += block.attention_count
            if block.name in self._rounds_after:
                hidden = rounded(hidden, self._wire)
        return hidden

    def _set_running(self, sessions: set[SessionId]) -> None:
        with self._running_lock:
            self._running = sessions.pop() if len(sessions) == 1 else None
            self._given_up = False

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(f"the stage of layers {self.layers} is closed")


def kv_shape(blocks: tuple[Block, ...], format: str = "fp32") -> KvShape:
    """Of all attention operations together; they must agree on heads, since they share one pool."""
    operations = [o for block in blocks for o in block.operations if o.kind == "attention"]
    shapes = {(int(o.attributes["kv_heads"]), int(o.attributes["head_dim"])) for o in operations}
    if len(shapes) != 1:
        raise EngineError(f"attention with {len(shapes)} different KV shapes in one stage is not supported")
    kv_heads, head_dim = shapes.pop()
    return KvShape(len(operations), kv_heads, head_dim, format)


def _make_cache(blocks: tuple[Block, ...], budget_bytes: int, layers: LayerRange, format: str) -> KvCache:
    shape = kv_shape(blocks, format)
    pages = shape.pages_in(budget_bytes)
    if pages == 0:
        raise CapacityError(
            f"layers {layers} need at least {shape.page_bytes} bytes of KV memory; {budget_bytes} are left",
            hint="give this device more memory, or fewer layers",
        )
    return KvCache(shape, pages)


def _make_expert_cache(
    bundle: Bundle, blocks: tuple[Block, ...], options: ExpertOptions | None
) -> ExpertsApart | None:
    """None also where these layers have no experts."""
    if isinstance(options, PeerOptions):
        return PeerExperts(options)
    layers = expert_layers(bundle, blocks) if options is not None else ()
    if not layers or options is None:
        return None
    if isinstance(options, HelpedOptions):
        # A layer may be divided, so that nobody sees all of what it chose: nothing is guessed.
        return FlashAndPeers(ExpertCache(layers, replace(options.cache, prediction=OFF)), options)
    gates = () if options.prediction == OFF else next_gates(bundle, blocks)
    return ExpertCache(layers, options, gates=gates)


def _cache_of(experts: ExpertsApart | None) -> ExpertCache | None:
    return experts if isinstance(experts, ExpertCache) else None


def _ropes(bundle: Bundle, cache: KvCache) -> RopeTables:
    """Tables up to the longest session that can be open here."""
    capacity = cache.table.num_pages * PAGE_TOKENS
    positions = min(bundle.manifest.model.max_context_tokens, capacity)
    return {name: rope_tables(rope, positions) for name, rope in bundle.manifest.ropes.items()}
