"""The torch stage: blocks on a CUDA device, or on the CPU as a reference.

On Triton kernels a row's result depends on its own session's history alone as far as a device's tile products do not
depend on a row's place in its tile; `engine/probe.py` measures that on each device.
Knows: blocks, KV memory, ragged batches. Does not know: links, leases, sampling, other stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from edge_kernels.triton.shapes import Matrix
from torch import Tensor

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest, ModelInfo
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import DEFAULT_FORMATS, Batch, Rows, Span, StageFormats
from edge_runtime.engine.cpu import kv_shape
from edge_runtime.engine.kv_cache import KvShape
from edge_runtime.engine.resident import return_free_memory
from edge_runtime.engine.rope import rope_tables
from edge_runtime.engine.side_pages import Tables, side_pages
from edge_runtime.engine.spans import StageShape, check_batch, check_open
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic, choose, device_memory_bytes
from edge_runtime.engine.torch_stage.blocks import TorchBlock
from edge_runtime.engine.torch_stage.kv_pages import TorchPages, make_pages, page_bytes
from edge_runtime.engine.torch_stage.rows import Ropes, torch_context
from edge_runtime.engine.wire import FP32, check_wire, rounded
from edge_runtime.errors import CapacityError, EdgeRuntimeError, EngineError


class TorchStage:
    """A Stage. Make one with `load`."""

    def __init__(
        self,
        bundle: Bundle,
        layers: LayerRange,
        arithmetic: Arithmetic,
        blocks: dict[str, TorchBlock],
        matrices: dict[str, Matrix],
        pages: TorchPages,
        formats: StageFormats = DEFAULT_FORMATS,
    ) -> None:
        manifest = bundle.manifest
        self.layers = layers
        self.arithmetic = arithmetic
        self.numeric_class = arithmetic.numeric_class(manifest.model.weights, formats.wire)
        self.weight_bytes = manifest.stage_weight_bytes(layers.first, layers.last)
        self.bundle_digest = bundle.digest
        self._shape = StageShape(manifest.model, layers, manifest.num_layers)
        self._blocks = blocks
        self._matrices = matrices
        self._pages = pages
        self._wire = formats.wire
        self._rounds_after = self._shape.boundaries if formats.wire != FP32 else frozenset()
        self.ropes = _ropes(manifest, pages, arithmetic.device)
        self._closed = False

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        layers: LayerRange,
        *,
        kv_budget_bytes: int,
        arithmetic: Arithmetic | None = None,
        reuse: TorchStage | None = None,
        formats: StageFormats = DEFAULT_FORMATS,
    ) -> TorchStage:
        """Load the blocks of `layers`. `reuse` is closed, and its blocks are kept where they are wanted again.

        Raises EngineError (a manifest that contradicts itself, layers that don't exist) or CapacityError (weights
        that do not fit the device, a budget that does not hold one page of KV).
        """
        check_wire(formats.wire)
        if formats.kv != "fp32":
            raise EngineError(
                f"the torch executor does not keep keys and values as {formats.kv}",
                hint="plan with full KV, or leave this device out",
            )
        manifest = bundle.manifest
        arithmetic = arithmetic or choose(manifest.model.weights)
        StageShape(manifest.model, layers, manifest.num_layers)  # layers exist
        wanted = manifest.blocks(layers.first, layers.last)
        kept, matrices = ({}, {}) if reuse is None else reuse.release_blocks(bundle.digest, arithmetic)
        kept = {block.name: kept[block.name] for block in wanted if block.name in kept}
        used = {name for block in kept.values() for name in block.matrices}
        matrices = {name: matrix for name, matrix in matrices.items() if name in used}
        blocks = {
            block.name: kept.get(block.name) or TorchBlock(bundle, block, arithmetic, matrices)
            for block in wanted
        }
        return_free_memory()
        pages = _make_pages(kv_shape(wanted), kv_budget_bytes, layers, arithmetic)
        stage = cls(bundle, layers, arithmetic, blocks, matrices, pages, formats)
        if arithmetic.is_cuda:
            stage.warm_up()
        return stage

    @property
    def model(self) -> ModelInfo:
        return self._shape.model

    @property
    def blocks(self) -> Mapping[str, TorchBlock]:
        """By name, in order; for probes."""
        return self._blocks

    @property
    def kv_shape(self) -> KvShape:
        return self._pages.shape

    @property
    def kv_capacity_tokens(self) -> int:
        return self._pages.table.capacity_tokens

    @property
    def kv_used_tokens(self) -> int:
        """Reserved by open sessions, in whole pages."""
        return self._pages.table.reserved_tokens

    @property
    def spare_pages(self) -> int:
        return self._pages.table.spare_pages

    @property
    def kv_committed_bytes(self) -> int:
        return self._pages.committed_bytes

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        self._check_usable()
        check_open(self._shape, session, max_rows)
        return self._pages.open(session, max_rows, page_names)

    def keep(
        self, session: SessionId, first_page: int, page_names: Sequence[bytes], ids: Sequence[int]
    ) -> None:
        if session in self._pages.table:
            self._pages.keep(session, first_page, page_names, ids)

    def give_back(self, *, all_pages: bool = False) -> None:
        if all_pages:
            self._pages.give_up_resting()
        else:
            self._pages.grow_older()

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        if session not in self._pages.table:
            return
        if from_row > 0:
            self._pages.truncate(session, from_row)
        else:
            self._pages.drop(session)

    def rows(self, session: SessionId) -> int:
        """How many rows of the session this stage holds."""
        return self._pages.table.get(session).rows

    def close(self) -> None:
        self._pages.close()
        self._blocks, self._matrices = {}, {}
        self._closed = True
        if self.arithmetic.is_cuda:
            torch.cuda.empty_cache()

    def release_blocks(
        self, digest: str, arithmetic: Arithmetic
    ) -> tuple[dict[str, TorchBlock], dict[str, Matrix]]:
        """Close this stage and hand over its blocks and matrices, where they are of that bundle and arithmetic."""
        blocks, matrices = self._blocks, self._matrices
        self.close()
        is_same = (digest, arithmetic) == (self.bundle_digest, self.arithmetic)
        return (blocks, matrices) if is_same else ({}, {})

    def run(self, batch: Batch) -> Rows:
        self._check_usable()
        if not batch.spans:
            raise EngineError("a batch without spans")
        check_batch(batch, self._shape, self._pages.table)
        for span in batch.spans:
            self._pages.append(span.session, span.base_row, len(span.ids))
        try:
            with (
                torch.inference_mode(),
                _threads_of(self.arithmetic),
                side_pages(self._pages, batch.spans) as sides,
            ):
                rows = self._run_blocks(batch, sides)
        except Exception as error:
            # The sessions hold rows that were not computed: forget them, and they can be sent again.
            for span in batch.spans:
                self._pages.truncate(span.session, span.base_row)
            if isinstance(error, EdgeRuntimeError):
                raise
            raise EngineError(f"layers {self.layers} could not run a batch: {error}") from error
        for span in batch.spans:
            self._pages.ran(span.session, span.base_row, span.ids)
        return rows

    def _run_blocks(self, batch: Batch, sides: Tables) -> Rows:
        context = torch_context(batch.spans, self._pages, self.ropes, sides)
        wants_logits = self._shape.is_tail and self._shape.model.kind == "generator"
        hidden = self._receive(batch.hidden)
        kv_layer = 0
        for name, block in self._blocks.items():
            if name == "head" and wants_logits:
                if not len(context.layout.logit_rows):  # the head is the costliest block: only rows asked for
                    return np.zeros((0, self._shape.model.vocab_size), np.float32)
                hidden = hidden[torch.from_numpy(context.layout.logit_rows).to(hidden.device)]
            hidden = block.run(hidden.to(self.arithmetic.dtype), context, kv_layer)
            kv_layer += block.attention_count
            if name in self._rounds_after:
                hidden = torch.from_numpy(rounded(_sent(hidden), self._wire)).to(self.arithmetic.device)
        return _sent(hidden)

    def _receive(self, rows: Rows | None) -> Tensor:
        """Rows come in float32 and were rounded to this stage's type by the stage before, if it is of this class."""
        given = np.zeros((0, 0), np.float32) if rows is None else np.array(rows)
        return torch.from_numpy(given).to(self.arithmetic.device, self.arithmetic.dtype)

    def warm_up(self) -> None:
        """Run every block once: on a GPU, programs are compiled when they are first launched, which takes seconds."""
        session = SessionId(0)
        for name, block in self._blocks.items():
            shape = replace(self._pages.shape, layers=max(block.attention_count, 1))
            pages = self.scratch_pages(shape, 1)
            pages.open(session, 2)
            pages.append(session, 0, 2)
            hidden = np.zeros((2, self._shape.model.hidden_size), np.float32)
            self.run_block(name, hidden, [Span(session, 0, (0, 0))], pages)

    # ------------------------------------------------------------ for probes

    def scratch_pages(self, shape: KvShape, num_pages: int) -> TorchPages:
        return make_pages(shape, num_pages, self.arithmetic)

    def run_block(self, name: str, hidden: Rows, spans: Sequence[Span], pages: TorchPages) -> Rows:
        with torch.inference_mode(), _threads_of(self.arithmetic):
            return _sent(
                self._blocks[name].run(self._receive(hidden), torch_context(spans, pages, self.ropes), 0)
            )

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(f"the stage of layers {self.layers} is closed")


def _sent(hidden: Tensor) -> Rows:
    return np.asarray(hidden.float().cpu().numpy())


@contextmanager
def _threads_of(arithmetic: Arithmetic) -> Iterator[None]:
    """The reference computes on one thread: sums that threads share depend on their number."""
    before = torch.get_num_threads()
    if arithmetic.is_cuda or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_pages(shape: KvShape, budget_bytes: int, layers: LayerRange, arithmetic: Arithmetic) -> TorchPages:
    free_bytes = device_memory_bytes() if arithmetic.is_cuda else None
    left_bytes = budget_bytes if free_bytes is None else min(budget_bytes, free_bytes)
    one_bytes = page_bytes(shape, arithmetic)
    if left_bytes < one_bytes:
        raise CapacityError(
            f"layers {layers} need at least {one_bytes} bytes of KV memory; {max(left_bytes, 0)} are left",
            hint="give this device more memory, or fewer layers",
        )
    return make_pages(shape, left_bytes // one_bytes, arithmetic)


def _ropes(manifest: Manifest, pages: TorchPages, device: torch.device) -> Ropes:
    """Tables up to the longest session that can be open here."""
    positions = min(manifest.model.max_context_tokens, pages.table.capacity_tokens)
    ropes = {}
    for name, rope in manifest.ropes.items():
        cos, sin = rope_tables(rope, positions)
        ropes[name] = (torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device))
    return ropes
