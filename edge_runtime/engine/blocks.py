"""A loaded block: its operations as steps, in order, independent of which stage it is part of.

Knows: how values flow from step to step. Does not know: layers' places in a stage, sessions, batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from edge_kernels.attention import RaggedRows
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block
from edge_runtime.engine.base import Span
from edge_runtime.engine.cut_operations import CutStep, ExpertsStep, RopeTables, RunContext, cut_step
from edge_runtime.engine.executors import SegmentStep, load_segment
from edge_runtime.engine.kv_cache import KvCache
from edge_runtime.engine.resident import forget_pages
from edge_runtime.engine.spans import lay_out
from edge_runtime.errors import EngineError
from edge_runtime.experts.runner import ExpertSource

Float32 = NDArray[np.float32]


class LoadedBlock:
    """The embedding, one layer, or the head."""

    def __init__(
        self, bundle: Bundle, block: Block, executor: str, threads: int, experts: ExpertSource | None = None
    ) -> None:
        self.name = block.name
        self.threads = threads
        self.is_causal = all(o.attributes.get("causal", True) for o in block.operations)
        self.attention_count = sum(operation.kind == "attention" for operation in block.operations)
        try:
            self._steps = _compile(bundle, block, executor, threads, experts)
        except (ValueError, TypeError, KeyError) as error:  # a manifest whose numbers contradict each other
            raise EngineError(
                f"block {block.name} can't be loaded: {error}", hint="export the bundle again"
            ) from error
        on_flash = bundle.manifest.expert_slices(block) if experts is not None else ()
        forget_pages(bundle, [key for key in block.slices if key not in on_flash])

    @property
    def steps(self) -> Sequence[SegmentStep | CutStep]:
        return self._steps

    @property
    def experts_steps(self) -> list[ExpertsStep]:
        """For whoever wants to watch or replace what runs the experts."""
        return [step for step in self._steps if isinstance(step, ExpertsStep)]

    def use_experts(self, bundle: Bundle, experts: ExpertSource | None) -> None:
        """A block that is used again by another stage gets those of that stage."""
        for step in self.experts_steps:
            step.use_experts(bundle, experts)

    def run(self, hidden: Float32, context: RunContext, kv_layer: int) -> Float32:
        values = {"hidden": hidden}
        if self.attention_count:
            context = replace(context, kv_layer=kv_layer)
        for step in self._steps:
            inputs = [values[name] for name in step.inputs]
            results = step.run(inputs, context) if isinstance(step, CutStep) else step.run(inputs)
            values.update(zip(step.outputs, results, strict=True))
        return values["hidden"]


def _compile(
    bundle: Bundle, block: Block, executor: str, threads: int, experts: ExpertSource | None
) -> list[SegmentStep | CutStep]:
    """Segments cover the maximal runs of uncut operations, in order: the bundle's checks made sure."""
    segments = {segment.first_operation: segment for segment in block.segments}
    steps: list[SegmentStep | CutStep] = []
    kv_index = 0
    for index, operation in enumerate(block.operations):
        if operation.is_cut:
            steps.append(cut_step(bundle, operation, kv_index, threads, experts))
            kv_index += operation.kind == "attention"
        elif index in segments:
            steps.append(load_segment(executor, bundle, block, segments[index], threads))
    return steps


def run_context(
    spans: Sequence[Span], cache: KvCache, ropes: RopeTables, sides: Sequence[Sequence[int]] = ()
) -> RunContext:
    """For spans whose rows `cache` holds already. `sides`: tables of their side rows (`side_pages`)."""
    layout = lay_out(spans)
    tables = cache.block_tables([span.session for span in spans], sides)
    written = None
    if layout.written is not None:
        places = layout.written.positions, layout.written.sequence
        written = RaggedRows(*places, tables, layout.lengths)
    return RunContext(
        ids=np.array([token for span in spans for token in span.ids + span.sides.ids], np.int64),
        layout=layout,
        rows=RaggedRows(layout.positions, layout.sequence, tables, layout.lengths),
        pool=cache.pool,
        kv_layer=0,
        ropes=ropes,
        written=written,
    )
